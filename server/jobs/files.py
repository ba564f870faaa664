"""Access of jobs to workspace files: reads them from PostgreSQL, one at a time."""

from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from datetime import datetime
from typing import Any
from uuid import UUID

from asyncpg import Record

from server import json
from server.documents import logs
from server.documents import store as documents
from server.documents.paths import problem_with
from server.documents.workshop import Workshop
from server.errors import NotFound, TooLarge
from server.jobs.sandbox import MOST_FILE_BYTES, MOST_FILES
from server.postgres import Executor
from server.workspaces import store as workspaces

PAGE = 200
MAX_NAME_BYTES = 255  # of a path segment, on every common file system
MAX_WARNINGS = 20
Skip = Callable[[str, str], None]  # receives the path and the reason


class Skipped:
    """The files that a job skips because of their paths: warnings in its result."""

    def __init__(self) -> None:
        self._warnings: list[str] = []
        self._more = 0

    def add(self, path: str, problem: str) -> None:
        if len(self._warnings) < MAX_WARNINGS:
            self._warnings.append(f"Skipped {json.dumps(path).decode()}: {problem}")
        else:
            self._more += 1

    @property
    def warnings(self) -> list[str]:
        return [*self._warnings, *([f"Skipped {self._more} more files."] if self._more else [])]


@dataclass(frozen=True)
class File:
    id: UUID
    path: str
    mime_type: str
    size: int
    updated_at: datetime


class Files:
    """The reader of workspace files."""

    def __init__(self, db: Executor) -> None:
        self._db = db
        self._workshop = Workshop()

    async def of_workspace(self, workspace: UUID, skip: Skip) -> AsyncIterator[File]:
        """Yield the files in the order of their paths; skip those that a file system cannot hold."""
        after: str | None = None
        while True:
            rows = await documents.list_files(self._db, workspace=workspace, limit=PAGE, after=after)
            for row in rows[:PAGE]:
                if problem := _problem_with(row):
                    skip(row["path"], problem)
                else:
                    yield _file(row)
            if len(rows) <= PAGE:
                return
            after = rows[PAGE - 1]["path"]

    async def workspaces(self, project: UUID) -> AsyncIterator[tuple[UUID, str]]:
        """Yield the ids and names of a project's workspaces, oldest first."""
        after: tuple[Any, Any] = (None, None)
        while True:
            rows = await workspaces.list_workspaces(self._db, project=project, limit=PAGE, after=after)
            for row in rows[:PAGE]:
                yield row["id"], row["name"]
            if len(rows) <= PAGE:
                return
            after = rows[PAGE - 1]["created_at"], rows[PAGE - 1]["id"]

    async def text(self, document: UUID) -> str:
        """Return the text of a document.

        Raises:
            NotFound: the document does not exist, or has been deleted.
        """
        text, _ = await logs.text_now(self._db, self._workshop, document)
        return text

    async def content(self, file: File) -> bytes | None:
        """Return the content of a file, or None if it has been deleted since it was listed."""
        try:
            return (await self.text(file.id)).encode()
        except NotFound:
            return None

    async def for_program(self, workspace: UUID, skip: Skip) -> dict[str, bytes]:
        """Return all files of a workspace for the sandbox, by path.

        Raises:
            TooLarge: the files exceed the sandbox's limits.
        """
        contents: dict[str, bytes] = {}
        size = 0
        async for file in self.of_workspace(workspace, skip):
            size += file.size
            if len(contents) >= MOST_FILES or size > MOST_FILE_BYTES:
                raise TooLarge(
                    f"Workspace exceeds the maximum of {MOST_FILES} files or {MOST_FILE_BYTES >> 20} MiB for a program"
                )
            content = await self.content(file)
            if content is not None:
                contents[file.path] = content
        return contents


async def workspace_of(db: Executor, *, document: UUID) -> UUID:
    """Return the workspace of a document.

    Raises:
        NotFound: the document does not exist.
    """
    row = await documents.read_document(db, document=document)
    if row is None:
        raise NotFound("Document not found")
    workspace: UUID = row["workspace_id"]
    return workspace


def _problem_with(row: Record) -> str | None:
    """Return why the document cannot be a file beside the others, or None."""
    if row["is_folder"]:
        return "Its path is a folder of another document's path."
    if any(len(name.encode()) > MAX_NAME_BYTES for name in row["path"].split("/")):
        return f"A name exceeds the maximum of {MAX_NAME_BYTES} bytes."
    return problem_with(row["path"])


def _file(row: Record) -> File:
    return File(row["id"], row["path"], row["mime_type"], row["size"], row["updated_at"])
