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

CHUNK_CHARACTERS = 16_384
JOB_CHARACTERS = 8 << 20  # over all attempts; the rest is not stored
FLUSH_SECONDS = 0.1
LIVE_CHUNKS = 4  # published per flush; clients read the rest over REST
DUPLICATE = 11000
MARKER = "\n[output truncated at 8 Mi characters]\n"
_DIGITS = 10

Chunk = dict[str, Any]
Tell = Callable[[Sequence[Chunk]], Awaitable[None]]
Now = Callable[[], datetime]


async def prepare(mongo: Any) -> None:
    await mongo.logs.create_index([("time", ASCENDING)], name="time")


class Output:
    """The output writer of one attempt.

    The sandbox calls ``add``; ``flush_forever`` stores until it is cancelled.
    """

    def __init__(self, mongo: Any, *, job: str, claim: int, start: int, tell: Tell, now: Now) -> None:
        self._mongo = mongo
        self._job = job
        self._claim = claim
        self._end = start
        self._tell = tell
        self._now = now
        self._pieces: list[tuple[str, str]] = []
        self._unwritten: list[Chunk] = []
        self._come = asyncio.Event()
        self._writing = asyncio.Lock()

    def add(self, stream: str, _: int, text: str) -> None:
        """Add text of a stream. The sandbox bounds how much it passes on."""
        self._pieces.append((stream, text))
        self._come.set()

    async def keep(self) -> None:
        while True:
            await self._come.wait()
            try:
                await self.flush()
            except PyMongoError as error:
                log.warning("output not kept yet", error=str(error))
            await asyncio.sleep(FLUSH_SECONDS)

    async def flush(self) -> None:
        """Store all that was added; keep what could not be stored for the next flush.

        Raises:
            PyMongoError: MongoDB is unavailable.
        """
        async with self._writing:
            self._come.clear()
            pieces, self._pieces = self._pieces, []
            self._unwritten.extend(self._chunks(pieces))
            written: list[Chunk] = []
            while self._unwritten:
                written += await self._write()
            await self._tell(written[:LIVE_CHUNKS])

    async def _write(self) -> list[Chunk]:
        """Insert chunks and return those stored; those that remain have new offsets."""
        try:
            # Ordered: after an offset that is taken, no later offset belongs to this attempt.
            await self._mongo.logs.insert_many(self._unwritten, ordered=True)
        except BulkWriteError as error:
            if any(failure["code"] != DUPLICATE for failure in error.details["writeErrors"]):
                raise
            return await self._move_on()
        written, self._unwritten = self._unwritten, []
        return written

    async def _move_on(self) -> list[Chunk]:
        """Resolve a taken offset: this attempt took it and lost the response, or another attempt did."""
        ids = [chunk["_id"] for chunk in self._unwritten]
        taken = self._mongo.logs.find({"_id": {"$in": ids}}, {"claim": 1})
        claims = {chunk["_id"]: chunk.get("claim", 0) async for chunk in taken}  # absent in chunks of older versions
        stored = [chunk for chunk in self._unwritten if claims.get(chunk["_id"]) == self._claim]
        rest = [chunk for chunk in self._unwritten if claims.get(chunk["_id"]) != self._claim]
        if any(claim > self._claim for claim in claims.values()):
            self._end, rest = JOB_CHARACTERS, []
        elif any(claim < self._claim for claim in claims.values()):
            self._end = await end_of(self._mongo, job=self._job)
            rest = list(self._chunks([(chunk["stream"], chunk["text"]) for chunk in rest]))
        self._unwritten = rest
        return stored

    def _chunks(self, pieces: Sequence[tuple[str, str]]) -> Iterator[Chunk]:
        time = self._now()
        for stream, text in _merged(pieces):
            for start in range(0, len(text), CHUNK_CHARACTERS):
                part, offset = text[start : start + CHUNK_CHARACTERS], self._end
                room = JOB_CHARACTERS - len(MARKER) - offset
                if room < 0:
                    return
                if len(part) > room:
                    part = part[:room] + MARKER
                self._end += len(part)
                yield {
                    "_id": _id(self._job, offset),
                    "job": self._job,
                    "claim": self._claim,
                    "offset": offset,
                    "stream": stream,
                    "text": part,
                    "time": time,
                }


def _merged(pieces: Sequence[tuple[str, str]]) -> Iterator[tuple[str, str]]:
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


async def end_of(mongo: Any, *, job: str) -> int:
    """Return the offset at which the stored output ends."""
    last = await mongo.logs.find_one(_range(job), sort=[("_id", -1)])
    return last["offset"] + len(last["text"]) if last else 0


async def read(mongo: Any, *, job: str, after: int, limit: int) -> tuple[list[Chunk], int]:
    """Return the output after its first ``after`` characters, and the offset at which the returned part ends."""
    first = await mongo.logs.find_one({"_id": {"$gte": _id(job, 0), "$lte": _id(job, after)}}, sort=[("_id", -1)])
    chunks = mongo.logs.find(_range(job, first["offset"] if first else 0), sort=[("_id", ASCENDING)], limit=limit + 1)
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


def _range(job: str, offset: int = 0) -> dict[str, Any]:
    return {"_id": {"$gte": _id(job, offset), "$lt": f"{job};"}}


def _id(job: str, offset: int) -> str:
    return f"{job}:{offset:0{_DIGITS}}"
