"""The registry of workers in Redis: each worker sends heartbeats with its languages, and expires without them."""

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
    """The heartbeat of a worker: its sandbox, languages, queues and concurrency."""

    worker: str
    tier: str
    languages: Sequence[str]
    queues: Sequence[str]
    concurrency: int


async def report(redis: Redis, mine: Report) -> None:
    """Register this worker for the next 30 s."""
    expires_at = time.time() + EXPIRY_SECONDS
    async with redis.pipeline(transaction=True) as pipeline:
        pipeline.setex(_key(mine.worker), EXPIRY_SECONDS, orjson.dumps(asdict(mine)))
        pipeline.zadd(_INDEX, {mine.worker: expires_at})
        pipeline.zremrangebyscore(_INDEX, 0, time.time() - EXPIRY_SECONDS)
        await pipeline.execute()


async def keep_reporting(redis: Redis, mine: Report) -> None:
    """Send heartbeats until cancelled."""
    while True:
        try:
            await report(redis, mine)
        except (RedisError, OSError) as error:
            log.warning("worker not reported", error=str(error))
        await asyncio.sleep(REPORT_SECONDS)


async def withdraw(redis: Redis, worker: str) -> None:
    """Remove a worker that shuts down, so that no client waits for it."""
    try:
        async with redis.pipeline(transaction=True) as pipeline:
            pipeline.delete(_key(worker))
            pipeline.zrem(_INDEX, worker)
            await pipeline.execute()
    except (RedisError, OSError):
        return  # the entry expires


async def reported(redis: Redis) -> list[Report]:
    """Return the workers with a heartbeat within the last 30 s.

    Raises:
        RedisError: Redis is unavailable.
    """
    workers = await redis.zrange(_INDEX, 0, -1)
    if not workers:
        return []
    heartbeats: list[Any] = await redis.mget([_key(worker.decode()) for worker in workers])
    return [Report(**orjson.loads(heartbeat)) for heartbeat in heartbeats if heartbeat]


class Roster:
    """The registered workers, read from Redis at most once a second."""

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
        """Require that a registered worker supports the language.

        Without registered workers, or in an outage of Redis, the job may wait. So may a job whose queue no worker
        serves at the moment: its workers may be restarting.

        Raises:
            ValidationFailed: ``language_unavailable``: no worker supports the language.
            Unavailable: ``sandbox_unavailable``: no worker has a sandbox.
        """
        try:
            workers = await self.workers()
        except (RedisError, OSError) as error:
            log.warning("workers not known", error=str(error))
            return
        if workers and not any(worker.languages for worker in workers):
            raise Unavailable(
                "No worker has a sandbox to run programs", code="sandbox_unavailable", retry_after=EXPIRY_SECONDS
            )
        if workers and not any(language in worker.languages for worker in workers):
            raise ValidationFailed(f"No worker supports {language}", code="language_unavailable")


def _key(worker: str) -> str:
    return f"{{jobs.workers}}:{worker}"
