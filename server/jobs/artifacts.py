"""Files that jobs make, in GridFS. One belongs to the attempt that made it; only a completed job's is shown."""

import asyncio
import hashlib
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import datetime, timedelta
from typing import Any

from bson import Binary, ObjectId
from motor.motor_asyncio import AsyncIOMotorGridFSBucket
from pymongo import ASCENDING

from server.errors import TooLarge
from server.jobs.store import Job

KEPT = timedelta(days=7)
LARGEST = 1 << 30
ABANDONED = timedelta(hours=1)  # an upload that takes longer than any attempt
CHUNK_BYTES = READ_BYTES = 255 << 10
_NAME = "artifacts"


class Upload:
    """Writes chunks as the specification of GridFS has them. PyMongo's own writer gathers 48 MB before it sends."""

    def __init__(self, mongo: Any, id: ObjectId) -> None:
        self._chunks = mongo[f"{_NAME}.chunks"]
        self._id = id
        self._hash = hashlib.sha256()
        self._buffer = bytearray()
        self._written = 0
        self.size = 0

    async def write(self, data: bytes) -> None:
        """Raises TooLarge where it becomes more than an artifact may hold."""
        self.size += len(data)
        if self.size > LARGEST:
            raise TooLarge(f"An artifact may have {LARGEST} bytes")
        self._hash.update(data)
        self._buffer += data
        while len(self._buffer) >= CHUNK_BYTES:
            await self._send(bytes(self._buffer[:CHUNK_BYTES]))
            del self._buffer[:CHUNK_BYTES]

    async def finish(self) -> None:
        if self._buffer:
            await self._send(bytes(self._buffer))

    @property
    def sha256(self) -> str:
        return self._hash.hexdigest()

    async def _send(self, data: bytes) -> None:
        await self._chunks.insert_one({"files_id": self._id, "n": self._written, "data": Binary(data)})
        self._written += 1


async def prepare(mongo: Any) -> None:
    await mongo[f"{_NAME}.files"].create_index([("metadata.job", ASCENDING)], name="job")
    await mongo[f"{_NAME}.chunks"].create_index([("files_id", ASCENDING), ("n", ASCENDING)], name="chunk", unique=True)


@asynccontextmanager
async def upload(mongo: Any, *, job: Job, name: str, content_type: str, now: datetime) -> AsyncIterator[Upload]:
    """A new artifact of this attempt; nothing of it stays where the block fails."""
    metadata = {
        "job": job["_id"],
        "claim": job["claim"],
        "contentType": content_type,
        "expiresAt": now + KEPT,
    }
    id = ObjectId()
    written = Upload(mongo, id)
    try:
        yield written
        await written.finish()
    except BaseException:
        await asyncio.shield(mongo[f"{_NAME}.chunks"].delete_many({"files_id": id}))
        raise
    file = {"_id": id, "filename": name, "length": written.size, "chunkSize": CHUNK_BYTES, "uploadDate": now}
    await mongo[f"{_NAME}.files"].insert_one({**file, "metadata": metadata})


def described(upload: Upload, *, job: Job, name: str, now: datetime) -> dict[str, Any]:
    """As a job's result shows it."""
    return {
        "name": name,
        "size": upload.size,
        "sha256": upload.sha256,
        "url": f"/api/v1/jobs/{job['_id']}/artifacts/{name}",
        "expiresAt": now + KEPT,
    }


async def find(mongo: Any, *, job: Job, name: str) -> Any | None:
    """The file's document; None where it is not there, or not any more."""
    wanted = {"metadata.job": job["_id"], "metadata.claim": job["claim"], "filename": name}
    return await mongo[f"{_NAME}.files"].find_one(wanted)


async def chunks(mongo: Any, *, file: Any, start: int, stop: int) -> AsyncIterator[bytes]:
    """The bytes from ``start`` up to ``stop``."""
    stream = await _bucket(mongo).open_download_stream(file["_id"])
    stream.seek(start)
    left = stop - start
    while left > 0:
        data: bytes = await stream.read(min(READ_BYTES, left))
        if not data:
            return
        left -= len(data)
        yield data


async def discard(mongo: Any, *, job: str, claim: int) -> None:
    """Whatever an attempt made whose outcome is not that of the job."""
    await _delete(mongo, {"metadata.job": job, "metadata.claim": claim})


async def delete_of(mongo: Any, *, jobs: list[str]) -> None:
    await _delete(mongo, {"metadata.job": {"$in": jobs}})


async def delete_expired(mongo: Any, *, now: datetime) -> None:
    await _delete(mongo, {"metadata.expiresAt": {"$lt": now}})


async def delete_abandoned(mongo: Any, *, now: datetime) -> None:
    """Chunks of uploads that were killed, and files of attempts that another one has superseded."""
    old = {"_id": {"$lt": ObjectId.from_datetime(now - ABANDONED)}}
    async for chunk in mongo[f"{_NAME}.chunks"].find({**old, "n": 0}, {"files_id": 1}):
        if await mongo[f"{_NAME}.files"].find_one({"_id": chunk["files_id"]}, {"_id": 1}) is None:
            await mongo[f"{_NAME}.chunks"].delete_many({"files_id": chunk["files_id"]})
    async for file in mongo[f"{_NAME}.files"].find(old, {"metadata": 1}):
        holder = {"_id": file["metadata"]["job"], "claim": file["metadata"]["claim"], "status": "completed"}
        if await mongo.jobs.find_one(holder, {"_id": 1}) is None:
            await _bucket(mongo).delete(file["_id"])


async def _delete(mongo: Any, wanted: dict[str, Any]) -> None:
    async for file in mongo[f"{_NAME}.files"].find(wanted, {"_id": 1}):
        await _bucket(mongo).delete(file["_id"])


def _bucket(mongo: Any) -> Any:
    return AsyncIOMotorGridFSBucket(mongo, bucket_name=_NAME)
