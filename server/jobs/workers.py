"""Which workers there are and what they offer: each reports to Redis, and is forgotten when it does not."""

import asyncio
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import orjson
import structlog
from redis.asyncio import Redis
from redis.exceptions import RedisError

from server.errors import Unavailable, ValidationFailed

log = structlog.get_logger()

EXPIRY_SECONDS = 30
REPORT_SECONDS = 8.0
REMEMBERED_SECONDS = 1.0
_INDEX = "{jobs.workers}:index"


@dataclass(frozen=True)
class Report:
    worker: str
    tier: str
    languages: Sequence[str]
    queues: Sequence[str]
    concurrency: int


async def report(redis: Redis, mine: Report) -> None:
    """That this worker lives, for the next 30 s."""
    until = time.time() + EXPIRY_SECONDS
    async with redis.pipeline(transaction=True) as pipeline:
        pipeline.setex(_key(mine.worker), EXPIRY_SECONDS, orjson.dumps(asdict(mine)))
        pipeline.zadd(_INDEX, {mine.worker: until})
        pipeline.zremrangebyscore(_INDEX, 0, time.time() - EXPIRY_SECONDS)
        await pipeline.execute()


async def keep_reporting(redis: Redis, mine: Report) -> None:
    """For as long as the worker lives."""
    while True:
        try:
            await report(redis, mine)
        except (RedisError, OSError) as error:
            log.warning("worker not reported", error=str(error))
        await asyncio.sleep(REPORT_SECONDS)


async def withdraw(redis: Redis, worker: str) -> None:
    """It stops: nobody should wait for it."""
    try:
        async with redis.pipeline(transaction=True) as pipeline:
            pipeline.delete(_key(worker))
            pipeline.zrem(_INDEX, worker)
            await pipeline.execute()
    except (RedisError, OSError):
        return  # it expires


async def reported(redis: Redis) -> list[Report]:
    """The workers that have reported within 30 s.

    Raises:
        RedisError: Redis is away.
    """
    workers = await redis.zrange(_INDEX, 0, -1)
    if not workers:
        return []
    found: list[Any] = await redis.mget([_key(each.decode()) for each in workers])
    return [Report(**orjson.loads(each)) for each in found if each]


class Roster:
    """The reports, asked for at most once a second."""

    def __init__(self, redis: Redis) -> None:
        self._redis = redis
        self._known: list[Report] = []
        self._until = 0.0

    async def workers(self) -> list[Report]:
        if time.monotonic() > self._until:
            self._known = await reported(self._redis)
            self._until = time.monotonic() + REMEMBERED_SECONDS
        return self._known

    async def demand(self, language: str) -> None:
        """Whether somebody could run it; where nobody has reported it is not known, and it may wait. So may a job whose
        queue nobody serves at the moment: its workers may be about to come back.

        Raises:
            ValidationFailed: ``language_unavailable``.
            Unavailable: ``sandbox_unavailable``: no worker has a sandbox.
        """
        try:
            known = await self.workers()
        except (RedisError, OSError) as error:
            log.warning("workers not known", error=str(error))
            return
        if known and not any(each.languages for each in known):
            raise Unavailable("No worker has a sandbox", code="sandbox_unavailable", retry_after=EXPIRY_SECONDS)
        if known and not any(language in each.languages for each in known):
            raise ValidationFailed(f"No worker offers {language}", code="language_unavailable")


def _key(worker: str) -> str:
    return f"{{jobs.workers}}:{worker}"
