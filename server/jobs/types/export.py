"""EXPORT: the files of a project or a workspace as one artifact, in constant memory."""

import asyncio
import re
import tarfile
import zlib
from collections.abc import AsyncIterator, Callable
from datetime import UTC, datetime
from functools import partial
from typing import Any
from uuid import UUID

from marshmallow import ValidationError, fields, validate, validates_schema
from zipstream import ZIP_DEFLATED, ZipStream

from server import json
from server.documents.paths import normalize
from server.fields import Id, Schema
from server.jobs import artifacts, store
from server.jobs.attempt_context import AttemptContext
from server.jobs.table import JobTable
from server.jobs.workspace_files import OnSkip, SkippedFiles, WorkspaceFile

jobs = JobTable()
MAX_FOLDER_NAME_BYTES = 200  # followed by an id, it is still a valid name on every common file system
WINDOWS_DRIVE = re.compile("[A-Za-z]:")  # extractors that join such a path to their folder write outside of it
GZIP_WINDOW_BITS = 31  # zlib's value for a gzip header and the largest window
ArchiveFile = tuple[str, WorkspaceFile, bytes]


class Export(Schema):
    project_id = Id()
    workspace_id = Id()
    format = fields.String(required=True, validate=validate.OneOf(("json", "tar.gz", "zip")))

    @validates_schema
    def has_one_subject(self, data: dict[str, Any], **_: Any) -> None:
        if len({"project_id", "workspace_id"} & data.keys()) != 1:
            raise ValidationError("Exactly one of projectId and workspaceId is required.", "projectId")


@jobs.on("EXPORT", Export, timeout=300)
async def export(attempt: AttemptContext, payload: dict[str, Any]) -> dict[str, Any]:
    """Pack all files of a project or a workspace into one archive, available for 7 days."""
    pack, content_type = PACKERS[payload["format"]]
    name, now = f"export.{payload['format']}", store.mongo_now()
    job, mongo = attempt.record, attempt.stores.mongo
    skipped = SkippedFiles()
    async with artifacts.upload(mongo, job=job, name=name, content_type=content_type, now=now) as upload:
        async for data in pack(read_archive_files(attempt, payload, skipped.add)):
            await upload.write(data)
    return {"artifact": artifacts.result_entry(upload, job=job, name=name, now=now), "warnings": skipped.warnings}


async def read_archive_files(
    attempt: AttemptContext, payload: dict[str, Any], skip: OnSkip
) -> AsyncIterator[ArchiveFile]:
    """Yield the path in the archive, the file and the content of every file."""
    total = done = 0
    async for _, file in list_archive_paths(attempt, payload, lambda *_: None):
        total += file.size
    async for path, file in list_archive_paths(attempt, payload, skip):
        content = await attempt.files.read_content(file)
        if content is not None:
            yield path, file, content
        done += file.size
        await attempt.report_progress(100 * done / max(total, 1))


async def list_archive_paths(
    attempt: AttemptContext, payload: dict[str, Any], skip: OnSkip
) -> AsyncIterator[tuple[str, WorkspaceFile]]:
    """Yield the path in the archive and the file; in a project's archive, paths begin with the workspace's name."""
    taken: set[str] = set()
    async for folder, workspace in list_folders(attempt, payload, taken):
        async for file in attempt.files.list_files(workspace, partial(skip_in_folder, folder, skip)):
            path = folder + file.path
            if WINDOWS_DRIVE.match(path):
                skip(path, "Windows treats it as a path on a drive.")
            else:
                yield path, file


def skip_in_folder(folder: str, skip: OnSkip, path: str, problem: str) -> None:
    skip(folder + path, problem)


async def list_folders(
    attempt: AttemptContext, payload: dict[str, Any], taken: set[str]
) -> AsyncIterator[tuple[str, UUID]]:
    if workspace := payload.get("workspace_id"):
        yield "", workspace
        return
    async for id, name in attempt.files.list_workspaces(payload["project_id"]):
        yield f"{folder_name(name, id, taken)}/", id


def folder_name(name: str, id: UUID, taken: set[str]) -> str:
    """Return a directory name for the workspace: safe as a single path segment, and unique in the archive."""
    safe = "".join(c if c.isprintable() and c not in '/\\:*?"<>|' else "_" for c in normalize(name))
    safe = safe.encode()[:MAX_FOLDER_NAME_BYTES].decode(errors="ignore").strip(" .") or "workspace"
    folder = safe if safe.casefold() not in taken else f"{safe} ({id})"
    taken.add(folder.casefold())
    return folder


async def pack_zip(files: AsyncIterator[ArchiveFile]) -> AsyncIterator[bytes]:
    archive = ZipStream(compress_type=ZIP_DEFLATED)
    async for path, _, content in files:
        archive.add(content, path)
        yield await asyncio.to_thread(b"".join, archive.file())
    yield await asyncio.to_thread(b"".join, archive.finalize())


async def pack_tar(files: AsyncIterator[ArchiveFile]) -> AsyncIterator[bytes]:
    compressor = zlib.compressobj(wbits=GZIP_WINDOW_BITS)
    async for path, file, content in files:
        header = tarfile.TarInfo(path)
        header.size, header.mtime = len(content), int(file.updated_at.timestamp())
        padding = b"\0" * (-len(content) % tarfile.BLOCKSIZE)
        raw = b"".join((header.tobuf(tarfile.PAX_FORMAT), content, padding))
        yield await asyncio.to_thread(compressor.compress, raw)
    yield compressor.compress(b"\0" * (2 * tarfile.BLOCKSIZE)) + compressor.flush()


async def pack_json(files: AsyncIterator[ArchiveFile]) -> AsyncIterator[bytes]:
    yield b'{"exportedAt":' + json.dumps(datetime.now(UTC)) + b',"documents":['
    comma = b""
    async for path, file, content in files:
        described = {"path": path, "mimeType": file.mime_type, "updatedAt": file.updated_at}
        yield comma + json.dumps({**described, "content": content.decode()})
        comma = b","
    yield b"]}"


Packer = Callable[[AsyncIterator[ArchiveFile]], AsyncIterator[bytes]]
PACKERS: dict[str, tuple[Packer, str]] = {
    "zip": (pack_zip, "application/zip"),
    "tar.gz": (pack_tar, "application/gzip"),
    "json": (pack_json, "application/json"),
}
