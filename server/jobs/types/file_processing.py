"""FILE_PROCESSING: describes the files of a workspace."""

import asyncio
import hashlib
from collections import Counter
from typing import Any

import filetype
from marshmallow import fields, validate
from pygments.lexers import get_lexer_for_filename
from pygments.util import ClassNotFound

from server.documents.paths import normalize
from server.errors import NotFound, TooLarge
from server.fields import Id, Schema, Text
from server.jobs.attempt_context import AttemptContext
from server.jobs.table import JobTable
from server.jobs.workspace_files import SkippedFiles, WorkspaceFile

jobs = JobTable()
MAX_PATHS = 1000
MAX_PROCESSED_FILES = 10_000


class FileProcessing(Schema):
    workspace_id = Id(required=True)
    paths = fields.List(Text(1, 512), validate=validate.Length(1, MAX_PATHS))


@jobs.on("FILE_PROCESSING", FileProcessing, timeout=300)
async def process(attempt: AttemptContext, payload: dict[str, Any]) -> dict[str, Any]:
    """Describe the files of a workspace, or those at given paths: size, hash, type, language and counts."""
    skipped = SkippedFiles()
    files = await select_files(attempt, payload, skipped)
    described = []
    for number, file in enumerate(files):
        content = await attempt.files.read_content(file)
        if content is not None:
            described.append(await asyncio.to_thread(describe_file, file, content))
        await attempt.report_progress(100 * (number + 1) / len(files))
    return {"files": described, "totals": sum_files(described), "warnings": skipped.warnings}


async def select_files(attempt: AttemptContext, payload: dict[str, Any], skipped: SkippedFiles) -> list[WorkspaceFile]:
    paths = {normalize(path) for path in payload["paths"]} if "paths" in payload else None
    files: list[WorkspaceFile] = []
    skipped_paths: set[str] = set()

    def skip(path: str, problem: str) -> None:
        if paths is None or normalize(path) in paths:
            skipped_paths.add(normalize(path))
            skipped.add(path, problem)

    async for file in attempt.files.list_files(payload["workspace_id"], skip):
        if paths is None or file.path in paths:
            files.append(file)
        if len(files) > MAX_PROCESSED_FILES:
            raise TooLarge(f"Workspace exceeds the maximum of {MAX_PROCESSED_FILES} files")
    if missing := (paths or set()) - {file.path for file in files} - skipped_paths:
        raise NotFound(f"File not found: {min(missing)}")
    return files


def describe_file(file: WorkspaceFile, content: bytes) -> dict[str, Any]:
    text = content.decode()  # documents are text
    return {
        "path": file.path,
        "size": len(content),
        "sha256": hashlib.sha256(content).hexdigest(),
        "mimeType": filetype.guess_mime(content) or file.mime_type,
        "encoding": "ascii" if text.isascii() else "utf-8",
        "language": language_of(file.path),
        "lines": text.count("\n") + (not text.endswith("\n") and bool(text)),
        "words": len(text.split()),
    }


def language_of(path: str) -> str | None:
    """Return the programming language by the file's name: guessing from the text takes a second per megabyte."""
    try:
        name: str = get_lexer_for_filename(path).name
    except ClassNotFound:
        return None
    return name


def sum_files(files: list[dict[str, Any]]) -> dict[str, Any]:
    languages = Counter(file["language"] for file in files if file["language"])
    return {
        "files": len(files),
        "size": sum(file["size"] for file in files),
        "lines": sum(file["lines"] for file in files),
        "words": sum(file["words"] for file in files),
        "languages": [{"language": name, "files": count} for name, count in sorted(languages.items())],
    }
