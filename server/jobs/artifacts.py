"""Files that jobs produce, in GridFS.

An artifact belongs to the attempt that produced it. Clients see only the artifact of a completed job.
"""

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
CHUNK_BYTES = READ_BYTES = 255 << 10
AT_ONCE = 20  # files per delete
_NAME = "artifacts"
FILES, CHUNKS = f"{_NAME}.files", f"{_NAME}.chunks"


class Upload:
    """A writer of one file, in chunks as the GridFS specification defines them.

    PyMongo's own writer collects 48 MB before it sends. The file's document is inserted first, so that the clean-up
    finds the chunks of an upload whose worker was killed.
    """

    def __init__(self, mongo: Any, id: ObjectId) -> None:
        self._mongo = mongo
        self._id = id
        self._hash = hashlib.sha256()
        self._buffer = bytearray()
        self._written = 0
        self.size = 0

    @classmethod
    async def begin(cls, mongo: Any, *, job: Job, name: str, content_type: str, now: datetime) -> "Upload":
        id = ObjectId()
        metadata = {
            "job": job["_id"],
            "claim": job["claim"],
            "contentType": content_type,
            "expiresAt": now + KEPT,
            "unsettledSince": now,  # until the clean-up knows whether this attempt's outcome became that of the job
        }
        file = {"_id": id, "filename": name, "length": 0, "chunkSize": CHUNK_BYTES, "uploadDate": now}
        await mongo[FILES].insert_one({**file, "metadata": metadata})
        return cls(mongo, id)

    async def write(self, data: bytes) -> None:
        """Append data to the file.

        Raises:
            TooLarge: the artifact exceeds its maximum size.
        """
        self.size += len(data)
        if self.size > LARGEST:
            raise TooLarge(f"Artifact exceeds the maximum size of {LARGEST >> 30} GiB")
        self._hash.update(data)
        self._buffer += data
        while len(self._buffer) >= CHUNK_BYTES:
            await self._send(bytes(self._buffer[:CHUNK_BYTES]))
            del self._buffer[:CHUNK_BYTES]

    async def finish(self) -> None:
        if self._buffer:
            await self._send(bytes(self._buffer))
        await self._mongo[FILES].update_one({"_id": self._id}, {"$set": {"length": self.size}})

    async def drop(self) -> None:
        await _delete_files(self._mongo, [self._id])

    @property
    def sha256(self) -> str:
        return self._hash.hexdigest()

    async def _send(self, data: bytes) -> None:
        await self._mongo[CHUNKS].insert_one({"files_id": self._id, "n": self._written, "data": Binary(data)})
        self._written += 1


async def prepare(mongo: Any) -> None:
    for key in ("job", "expiresAt"):
        await mongo[FILES].create_index([(f"metadata.{key}", ASCENDING)], name=key)
    await mongo[FILES].create_index([("metadata.unsettledSince", ASCENDING)], name="unsettledSince", sparse=True)
    await mongo[CHUNKS].create_index([("files_id", ASCENDING), ("n", ASCENDING)], name="chunk", unique=True)


@asynccontextmanager
async def upload(mongo: Any, *, job: Job, name: str, content_type: str, now: datetime) -> AsyncIterator[Upload]:
    """Create an artifact of this attempt; delete it again if the block fails."""
    new_file = await Upload.begin(mongo, job=job, name=name, content_type=content_type, now=now)
    try:
        yield new_file
        await new_file.finish()
    except BaseException:
        await asyncio.shield(new_file.drop())
        raise


def described(upload: Upload, *, job: Job, name: str, now: datetime) -> dict[str, Any]:
    """Return the artifact's entry in the result of its job."""
    return {
        "name": name,
        "size": upload.size,
        "sha256": upload.sha256,
        "url": f"/api/v1/jobs/{job['_id']}/artifacts/{name}",
        "expiresAt": now + KEPT,
    }


async def find(mongo: Any, *, job: Job, name: str) -> Any | None:
    """Return the GridFS document of the file, or None if it does not exist or has been deleted."""
    query = {"metadata.job": job["_id"], "metadata.claim": job["claim"], "filename": name}
    return await mongo[FILES].find_one(query)


async def chunks(mongo: Any, *, file: Any, start: int, stop: int) -> AsyncIterator[bytes]:
    """Yield the bytes from ``start`` up to, but not including, ``stop``."""
    stream = await _bucket(mongo).open_download_stream(file["_id"])
    stream.seek(start)
    remaining = stop - start
    while remaining > 0:
        data: bytes = await stream.read(min(READ_BYTES, remaining))
        if not data:
            return
        remaining -= len(data)
        yield data


async def discard(mongo: Any, *, job: str, claim: int) -> None:
    """Delete the files of an attempt whose outcome did not become that of the job."""
    await _delete(mongo, {"metadata.job": job, "metadata.claim": claim})


async def delete_expired(mongo: Any, *, before: datetime) -> None:
    await _delete(mongo, {"metadata.expiresAt": {"$lt": before}})


async def delete_abandoned(mongo: Any, *, before: datetime) -> None:
    """Delete the files of attempts that were killed or superseded; check each file once."""
    unsettled = {"metadata.unsettledSince": {"$lt": before}}
    while files := await mongo[FILES].find(unsettled, {"metadata": 1}, limit=AT_ONCE).to_list(None):
        claims = await _completed(mongo, [file["metadata"]["job"] for file in files])
        kept = [file["_id"] for file in files if claims.get(file["metadata"]["job"]) == file["metadata"]["claim"]]
        await mongo[FILES].update_many({"_id": {"$in": kept}}, {"$unset": {"metadata.unsettledSince": ""}})
        await _delete_files(mongo, [file["_id"] for file in files if file["_id"] not in kept])


async def _completed(mongo: Any, jobs: list[str]) -> dict[str, int]:
    """Return the claims that completed these jobs, by job."""
    completed = mongo.jobs.find({"_id": {"$in": jobs}, "status": "completed"}, {"claim": 1})
    return {job["_id"]: job["claim"] async for job in completed}


async def _delete(mongo: Any, query: dict[str, Any]) -> None:
    while files := await mongo[FILES].find(query, {"_id": 1}, limit=AT_ONCE).to_list(None):
        await _delete_files(mongo, [file["_id"] for file in files])


async def _delete_files(mongo: Any, ids: list[ObjectId]) -> None:
    """Delete files, the chunks first: after an interruption the next clean-up finds the rest by the file documents."""
    await mongo[CHUNKS].delete_many({"files_id": {"$in": ids}})
    await mongo[FILES].delete_many({"_id": {"$in": ids}})


def _bucket(mongo: Any) -> Any:
    return AsyncIOMotorGridFSBucket(mongo, bucket_name=_NAME)
