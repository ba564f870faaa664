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
from server.jobs.store import JobRecord

RETENTION = timedelta(days=7)
MAX_ARTIFACT_BYTES = 1 << 30
CHUNK_BYTES = READ_BYTES = 255 << 10
DELETE_BATCH_SIZE = 20  # files per delete
_BUCKET_NAME = "artifacts"
FILES_COLLECTION, CHUNKS_COLLECTION = f"{_BUCKET_NAME}.files", f"{_BUCKET_NAME}.chunks"


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
        self._chunk_count = 0
        self.size = 0

    @classmethod
    async def begin(cls, mongo: Any, *, job: JobRecord, name: str, content_type: str, now: datetime) -> "Upload":
        id = ObjectId()
        metadata = {
            "job": job["_id"],
            "claim": job["claim"],
            "contentType": content_type,
            "expiresAt": now + RETENTION,
            "unsettledSince": now,  # until the clean-up knows whether this attempt's outcome became that of the job
        }
        file = {"_id": id, "filename": name, "length": 0, "chunkSize": CHUNK_BYTES, "uploadDate": now}
        await mongo[FILES_COLLECTION].insert_one({**file, "metadata": metadata})
        return cls(mongo, id)

    async def write(self, data: bytes) -> None:
        """Append data to the file.

        Raises:
            TooLarge: the artifact exceeds its maximum size.
        """
        self.size += len(data)
        if self.size > MAX_ARTIFACT_BYTES:
            raise TooLarge(f"Artifact exceeds the maximum size of {MAX_ARTIFACT_BYTES >> 30} GiB")
        self._hash.update(data)
        self._buffer += data
        while len(self._buffer) >= CHUNK_BYTES:
            await self._insert_chunk(bytes(self._buffer[:CHUNK_BYTES]))
            del self._buffer[:CHUNK_BYTES]

    async def finish(self) -> None:
        if self._buffer:
            await self._insert_chunk(bytes(self._buffer))
        await self._mongo[FILES_COLLECTION].update_one({"_id": self._id}, {"$set": {"length": self.size}})

    async def delete(self) -> None:
        await _delete_files(self._mongo, [self._id])

    @property
    def sha256(self) -> str:
        return self._hash.hexdigest()

    async def _insert_chunk(self, data: bytes) -> None:
        await self._mongo[CHUNKS_COLLECTION].insert_one(
            {"files_id": self._id, "n": self._chunk_count, "data": Binary(data)}
        )
        self._chunk_count += 1


async def create_indexes(mongo: Any) -> None:
    for key in ("job", "expiresAt"):
        await mongo[FILES_COLLECTION].create_index([(f"metadata.{key}", ASCENDING)], name=key)
    await mongo[FILES_COLLECTION].create_index(
        [("metadata.unsettledSince", ASCENDING)], name="unsettledSince", sparse=True
    )
    await mongo[CHUNKS_COLLECTION].create_index([("files_id", ASCENDING), ("n", ASCENDING)], name="chunk", unique=True)


@asynccontextmanager
async def upload(mongo: Any, *, job: JobRecord, name: str, content_type: str, now: datetime) -> AsyncIterator[Upload]:
    """Create an artifact of this attempt; delete it again if the block fails."""
    new_file = await Upload.begin(mongo, job=job, name=name, content_type=content_type, now=now)
    try:
        yield new_file
        await new_file.finish()
    except BaseException:
        await asyncio.shield(new_file.delete())
        raise


def result_entry(upload: Upload, *, job: JobRecord, name: str, now: datetime) -> dict[str, Any]:
    """Return the artifact's entry in the result of its job."""
    return {
        "name": name,
        "size": upload.size,
        "sha256": upload.sha256,
        "url": f"/api/v1/jobs/{job['_id']}/artifacts/{name}",
        "expiresAt": now + RETENTION,
    }


async def find_file(mongo: Any, *, job: JobRecord, name: str) -> Any | None:
    """Return the GridFS document of the file, or None if it does not exist or has been deleted."""
    query = {"metadata.job": job["_id"], "metadata.claim": job["claim"], "filename": name}
    return await mongo[FILES_COLLECTION].find_one(query)


async def read_chunks(mongo: Any, *, file: Any, start: int, stop: int) -> AsyncIterator[bytes]:
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


async def delete_for_attempt(mongo: Any, *, job: str, claim: int) -> None:
    """Delete the files of an attempt whose outcome did not become that of the job."""
    await _delete_matching(mongo, {"metadata.job": job, "metadata.claim": claim})


async def delete_expired(mongo: Any, *, before: datetime) -> None:
    await _delete_matching(mongo, {"metadata.expiresAt": {"$lt": before}})


async def delete_abandoned(mongo: Any, *, before: datetime) -> None:
    """Delete the files of attempts that were killed or superseded; check each file once."""
    unsettled = {"metadata.unsettledSince": {"$lt": before}}
    while (
        files := await mongo[FILES_COLLECTION].find(unsettled, {"metadata": 1}, limit=DELETE_BATCH_SIZE).to_list(None)
    ):
        claims = await _completed_claims(mongo, [file["metadata"]["job"] for file in files])
        kept = [file["_id"] for file in files if claims.get(file["metadata"]["job"]) == file["metadata"]["claim"]]
        await mongo[FILES_COLLECTION].update_many({"_id": {"$in": kept}}, {"$unset": {"metadata.unsettledSince": ""}})
        await _delete_files(mongo, [file["_id"] for file in files if file["_id"] not in kept])


async def _completed_claims(mongo: Any, jobs: list[str]) -> dict[str, int]:
    """Return the claims that completed these jobs, by job."""
    completed = mongo.jobs.find({"_id": {"$in": jobs}, "status": "completed"}, {"claim": 1})
    return {job["_id"]: job["claim"] async for job in completed}


async def _delete_matching(mongo: Any, query: dict[str, Any]) -> None:
    while files := await mongo[FILES_COLLECTION].find(query, {"_id": 1}, limit=DELETE_BATCH_SIZE).to_list(None):
        await _delete_files(mongo, [file["_id"] for file in files])


async def _delete_files(mongo: Any, ids: list[ObjectId]) -> None:
    """Delete files, the chunks first: after an interruption the next clean-up finds the rest by the file documents."""
    await mongo[CHUNKS_COLLECTION].delete_many({"files_id": {"$in": ids}})
    await mongo[FILES_COLLECTION].delete_many({"_id": {"$in": ids}})


def _bucket(mongo: Any) -> Any:
    return AsyncIOMotorGridFSBucket(mongo, bucket_name=_BUCKET_NAME)
