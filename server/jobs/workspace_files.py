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
from server.jobs.sandbox import MAX_INPUT_BYTES, MAX_INPUT_FILES
from server.postgres import Executor
from server.workspaces import store as workspaces

PAGE_SIZE = 200
MAX_NAME_BYTES = 255  # of a path segment, on every common file system
MAX_WARNINGS = 20
OnSkip = Callable[[str, str], None]  # receives the path and the reason


class SkippedFiles:
    """The files that a job skips because of their paths: warnings in its result."""

    def __init__(self) -> None:
        self._warnings: list[str] = []
        self._omitted = 0

    def add(self, path: str, problem: str) -> None:
        if len(self._warnings) < MAX_WARNINGS:
            self._warnings.append(f"Skipped {json.dumps(path).decode()}: {problem}")
        else:
            self._omitted += 1

    @property
    def warnings(self) -> list[str]:
        return [*self._warnings, *([f"Skipped {self._omitted} more files."] if self._omitted else [])]


@dataclass(frozen=True)
class WorkspaceFile:
    id: UUID
    path: str
    mime_type: str
    size: int
    updated_at: datetime


class WorkspaceFiles:
    """The reader of workspace files."""

    def __init__(self, db: Executor) -> None:
        self._db = db
        self._workshop = Workshop()

    async def list_files(self, workspace: UUID, skip: OnSkip) -> AsyncIterator[WorkspaceFile]:
        """Yield the files in the order of their paths; skip those that a file system cannot hold."""
        after: str | None = None
        while True:
            rows = await documents.list_files(self._db, workspace=workspace, limit=PAGE_SIZE, after=after)
            for row in rows[:PAGE_SIZE]:
                if problem := _path_problem(row):
                    skip(row["path"], problem)
                else:
                    yield _to_workspace_file(row)
            if len(rows) <= PAGE_SIZE:
                return
            after = rows[PAGE_SIZE - 1]["path"]

    async def list_workspaces(self, project: UUID) -> AsyncIterator[tuple[UUID, str]]:
        """Yield the ids and names of a project's workspaces, oldest first."""
        after: tuple[Any, Any] = (None, None)
        while True:
            rows = await workspaces.list_workspaces(self._db, project=project, limit=PAGE_SIZE, after=after)
            for row in rows[:PAGE_SIZE]:
                yield row["id"], row["name"]
            if len(rows) <= PAGE_SIZE:
                return
            after = rows[PAGE_SIZE - 1]["created_at"], rows[PAGE_SIZE - 1]["id"]

    async def read_text(self, document: UUID) -> str:
        """Return the text of a document.

        Raises:
            NotFound: the document does not exist, or has been deleted.
        """
        text, _ = await logs.text_now(self._db, self._workshop, document)
        return text

    async def read_content(self, file: WorkspaceFile) -> bytes | None:
        """Return the content of a file, or None if it has been deleted since it was listed."""
        try:
            return (await self.read_text(file.id)).encode()
        except NotFound:
            return None

    async def load_for_sandbox(self, workspace: UUID, skip: OnSkip) -> dict[str, bytes]:
        """Return all files of a workspace for the sandbox, by path.

        Raises:
            TooLarge: the files exceed the sandbox's limits.
        """
        contents: dict[str, bytes] = {}
        size = 0
        async for file in self.list_files(workspace, skip):
            size += file.size
            if len(contents) >= MAX_INPUT_FILES or size > MAX_INPUT_BYTES:
                raise TooLarge(
                    f"Workspace exceeds the maximum of {MAX_INPUT_FILES} files or "
                    f"{MAX_INPUT_BYTES >> 20} MiB for a program"
                )
            content = await self.read_content(file)
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


def _path_problem(row: Record) -> str | None:
    """Return why the document cannot be a file beside the others, or None."""
    if row["is_folder"]:
        return "Its path is a folder of another document's path."
    if any(len(name.encode()) > MAX_NAME_BYTES for name in row["path"].split("/")):
        return f"A name exceeds the maximum of {MAX_NAME_BYTES} bytes."
    return problem_with(row["path"])


def _to_workspace_file(row: Record) -> WorkspaceFile:
    return WorkspaceFile(row["id"], row["path"], row["mime_type"], row["size"], row["updated_at"])
