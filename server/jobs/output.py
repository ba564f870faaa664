"""The output of a program: stored in MongoDB in bounded chunks, and published live.

An offset is a position in the whole output of a job, in characters, over both streams and all attempts. A chunk's
``_id`` is the job and the offset, so that chunks are ordered and each offset is taken once. If two attempts write at
the same offset, because one supersedes the other, the later attempt continues after what the earlier one has stored,
and the earlier attempt stores nothing more.
"""

import asyncio
from collections.abc import Awaitable, Callable, Iterator, Sequence
from datetime import datetime
from typing import Any

import structlog
from pymongo import ASCENDING
from pymongo.errors import BulkWriteError, PyMongoError

log = structlog.get_logger()

MAX_CHUNK_CHARACTERS = 16_384
MAX_JOB_CHARACTERS = 8 << 20  # over all attempts; the rest is not stored
FLUSH_INTERVAL_SECONDS = 0.1
MAX_LIVE_CHUNKS = 4  # published per flush; clients read the rest over REST
DUPLICATE_KEY_CODE = 11000
TRUNCATION_MARKER = "\n[output truncated at 8 Mi characters]\n"
_OFFSET_DIGITS = 10

Chunk = dict[str, Any]
OnStored = Callable[[Sequence[Chunk]], Awaitable[None]]
Clock = Callable[[], datetime]


async def create_indexes(mongo: Any) -> None:
    await mongo.logs.create_index([("time", ASCENDING)], name="time")


class OutputWriter:
    """The output writer of one attempt.

    The sandbox calls ``add``; ``flush_forever`` stores until it is cancelled.
    """

    def __init__(self, mongo: Any, *, job: str, claim: int, start: int, on_stored: OnStored, clock: Clock) -> None:
        self._mongo = mongo
        self._job = job
        self._claim = claim
        self._end = start
        self._on_stored = on_stored
        self._clock = clock
        self._pieces: list[tuple[str, str]] = []
        self._unwritten: list[Chunk] = []
        self._pending = asyncio.Event()
        self._flush_lock = asyncio.Lock()

    def add(self, stream: str, _: int, text: str) -> None:
        """Add text of a stream. The sandbox bounds how much it passes on."""
        self._pieces.append((stream, text))
        self._pending.set()

    async def flush_forever(self) -> None:
        while True:
            await self._pending.wait()
            try:
                await self.flush()
            except PyMongoError as error:
                log.warning("output not stored, retrying", error=str(error))
            await asyncio.sleep(FLUSH_INTERVAL_SECONDS)

    async def flush(self) -> None:
        """Store all that was added; keep what could not be stored for the next flush.

        Raises:
            PyMongoError: MongoDB is unavailable.
        """
        async with self._flush_lock:
            self._pending.clear()
            pieces, self._pieces = self._pieces, []
            self._unwritten.extend(self._split(pieces))
            written: list[Chunk] = []
            while self._unwritten:
                written += await self._insert()
            await self._on_stored(written[:MAX_LIVE_CHUNKS])

    async def _insert(self) -> list[Chunk]:
        """Insert chunks and return those stored; those that remain have new offsets."""
        try:
            # Ordered: after an offset that is taken, no later offset belongs to this attempt.
            await self._mongo.logs.insert_many(self._unwritten, ordered=True)
        except BulkWriteError as error:
            if any(failure["code"] != DUPLICATE_KEY_CODE for failure in error.details["writeErrors"]):
                raise
            return await self._resolve_conflict()
        written, self._unwritten = self._unwritten, []
        return written

    async def _resolve_conflict(self) -> list[Chunk]:
        """Resolve a taken offset: this attempt took it and lost the response, or another attempt did."""
        ids = [chunk["_id"] for chunk in self._unwritten]
        taken = self._mongo.logs.find({"_id": {"$in": ids}}, {"claim": 1})
        claims = {chunk["_id"]: chunk.get("claim", 0) async for chunk in taken}  # absent in chunks of older versions
        stored = [chunk for chunk in self._unwritten if claims.get(chunk["_id"]) == self._claim]
        rest = [chunk for chunk in self._unwritten if claims.get(chunk["_id"]) != self._claim]
        if any(claim > self._claim for claim in claims.values()):
            self._end, rest = MAX_JOB_CHARACTERS, []
        elif any(claim < self._claim for claim in claims.values()):
            self._end = await read_end_offset(self._mongo, job=self._job)
            rest = list(self._split([(chunk["stream"], chunk["text"]) for chunk in rest]))
        self._unwritten = rest
        return stored

    def _split(self, pieces: Sequence[tuple[str, str]]) -> Iterator[Chunk]:
        time = self._clock()
        for stream, text in _merge_pieces(pieces):
            for start in range(0, len(text), MAX_CHUNK_CHARACTERS):
                part, offset = text[start : start + MAX_CHUNK_CHARACTERS], self._end
                room = MAX_JOB_CHARACTERS - len(TRUNCATION_MARKER) - offset
                if room < 0:
                    return
                if len(part) > room:
                    part = part[:room] + TRUNCATION_MARKER
                self._end += len(part)
                yield {
                    "_id": _chunk_id(self._job, offset),
                    "job": self._job,
                    "claim": self._claim,
                    "offset": offset,
                    "stream": stream,
                    "text": part,
                    "time": time,
                }


def _merge_pieces(pieces: Sequence[tuple[str, str]]) -> Iterator[tuple[str, str]]:
    """Merge adjacent pieces of the same stream."""
    current, texts = "", list[str]()
    for stream, text in pieces:
        if stream != current and texts:
            yield current, "".join(texts)
            texts = []
        current = stream
        texts.append(text)
    if texts:
        yield current, "".join(texts)


async def read_end_offset(mongo: Any, *, job: str) -> int:
    """Return the offset at which the stored output ends."""
    last = await mongo.logs.find_one(_chunk_range(job), sort=[("_id", -1)])
    return last["offset"] + len(last["text"]) if last else 0


async def read(mongo: Any, *, job: str, after: int, limit: int) -> tuple[list[Chunk], int]:
    """Return the output after its first ``after`` characters, and the offset at which the returned part ends."""
    first = await mongo.logs.find_one(
        {"_id": {"$gte": _chunk_id(job, 0), "$lte": _chunk_id(job, after)}}, sort=[("_id", -1)]
    )
    chunks = mongo.logs.find(
        _chunk_range(job, first["offset"] if first else 0), sort=[("_id", ASCENDING)], limit=limit + 1
    )
    items: list[Chunk] = []
    async for chunk in chunks:
        skipped = max(0, after - chunk["offset"])
        if text := chunk["text"][skipped:]:
            offset = chunk["offset"] + skipped
            items.append({"offset": offset, "stream": chunk["stream"], "text": text, "time": chunk["time"]})
    items = items[:limit]
    end = items[-1]["offset"] + len(items[-1]["text"]) if items else after
    return items, end


async def delete_old(mongo: Any, *, before: datetime) -> None:
    await mongo.logs.delete_many({"time": {"$lt": before}})


def _chunk_range(job: str, offset: int = 0) -> dict[str, Any]:
    return {"_id": {"$gte": _chunk_id(job, offset), "$lt": f"{job};"}}


def _chunk_id(job: str, offset: int) -> str:
    return f"{job}:{offset:0{_OFFSET_DIGITS}}"
