"""FILE_PROCESSING: what a workspace's files are."""

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
from server.jobs.attempt import Attempt
from server.jobs.files import File, Skipped
from server.jobs.table import JobTable

jobs = JobTable()
MOST_PATHS = 1000
MOST_FILES = 10_000


class FileProcessing(Schema):
    workspace_id = Id(required=True)
    paths = fields.List(Text(1, 512), validate=validate.Length(1, MOST_PATHS))


@jobs.on("FILE_PROCESSING", FileProcessing, timeout=300)
async def process(attempt: Attempt, payload: dict[str, Any]) -> dict[str, Any]:
    """Measure and recognise the files of a workspace, or those at some paths."""
    skipped = Skipped()
    files = await chosen(attempt, payload, skipped)
    found = []
    for number, file in enumerate(files):
        content = await attempt.files.content(file)
        if content is not None:
            found.append(await asyncio.to_thread(describe, file, content))
        await attempt.progress(100 * (number + 1) / len(files))
    return {"files": found, "totals": totals(found), "warnings": skipped.warnings}


async def chosen(attempt: Attempt, payload: dict[str, Any], skipped: Skipped) -> list[File]:
    wanted = {normalize(path) for path in payload["paths"]} if "paths" in payload else None
    files: list[File] = []
    left_out: set[str] = set()

    def skip(path: str, problem: str) -> None:
        if wanted is None or normalize(path) in wanted:
            left_out.add(normalize(path))
            skipped.add(path, problem)

    async for file in attempt.files.of_workspace(payload["workspace_id"], skip):
        if wanted is None or file.path in wanted:
            files.append(file)
        if len(files) > MOST_FILES:
            raise TooLarge(f"The workspace has more than {MOST_FILES} files")
    if missing := (wanted or set()) - {file.path for file in files} - left_out:
        raise NotFound(f"No such file: {min(missing)}")
    return files


def describe(file: File, content: bytes) -> dict[str, Any]:
    text = content.decode()  # of documents, which are text
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
    """By the file's name: to guess from its text takes a second for a megabyte."""
    try:
        name: str = get_lexer_for_filename(path).name
    except ClassNotFound:
        return None
    return name


def totals(found: list[dict[str, Any]]) -> dict[str, Any]:
    languages = Counter(each["language"] for each in found if each["language"])
    return {
        "files": len(found),
        "size": sum(each["size"] for each in found),
        "lines": sum(each["lines"] for each in found),
        "words": sum(each["words"] for each in found),
        "languages": [{"language": name, "files": count} for name, count in sorted(languages.items())],
    }
