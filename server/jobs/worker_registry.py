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

HEARTBEAT_TTL_SECONDS = 30
HEARTBEAT_INTERVAL_SECONDS = 8.0
CACHE_TTL_SECONDS = 1.0
_INDEX_KEY = "{jobs.workers}:index"


@dataclass(frozen=True)
class WorkerHeartbeat:
    """The heartbeat of a worker: its sandbox, languages, queues and concurrency."""

    worker: str
    tier: str
    languages: Sequence[str]
    queues: Sequence[str]
    concurrency: int


async def send_heartbeat(redis: Redis, heartbeat: WorkerHeartbeat) -> None:
    """Register this worker for the next 30 s."""
    expires_at = time.time() + HEARTBEAT_TTL_SECONDS
    async with redis.pipeline(transaction=True) as pipeline:
        pipeline.setex(_worker_key(heartbeat.worker), HEARTBEAT_TTL_SECONDS, orjson.dumps(asdict(heartbeat)))
        pipeline.zadd(_INDEX_KEY, {heartbeat.worker: expires_at})
        pipeline.zremrangebyscore(_INDEX_KEY, 0, time.time() - HEARTBEAT_TTL_SECONDS)
        await pipeline.execute()


async def send_heartbeats_forever(redis: Redis, heartbeat: WorkerHeartbeat) -> None:
    """Send heartbeats until cancelled."""
    while True:
        try:
            await send_heartbeat(redis, heartbeat)
        except (RedisError, OSError) as error:
            log.warning("worker heartbeat not sent", error=str(error))
        await asyncio.sleep(HEARTBEAT_INTERVAL_SECONDS)


async def unregister(redis: Redis, worker: str) -> None:
    """Remove a worker that shuts down, so that no client waits for it."""
    try:
        async with redis.pipeline(transaction=True) as pipeline:
            pipeline.delete(_worker_key(worker))
            pipeline.zrem(_INDEX_KEY, worker)
            await pipeline.execute()
    except (RedisError, OSError):
        return  # the entry expires


async def list_workers(redis: Redis) -> list[WorkerHeartbeat]:
    """Return the workers with a heartbeat within the last 30 s.

    Raises:
        RedisError: Redis is unavailable.
    """
    workers = await redis.zrange(_INDEX_KEY, 0, -1)
    if not workers:
        return []
    heartbeats: list[Any] = await redis.mget([_worker_key(worker.decode()) for worker in workers])
    return [WorkerHeartbeat(**orjson.loads(heartbeat)) for heartbeat in heartbeats if heartbeat]


class WorkerRegistry:
    """The registered workers, read from Redis at most once a second."""

    def __init__(self, redis: Redis) -> None:
        self._redis = redis
        self._workers: list[WorkerHeartbeat] = []
        self._expires_at = 0.0

    async def workers(self) -> list[WorkerHeartbeat]:
        if time.monotonic() > self._expires_at:
            self._workers = await list_workers(self._redis)
            self._expires_at = time.monotonic() + CACHE_TTL_SECONDS
        return self._workers

    async def require_language(self, language: str) -> None:
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
            log.warning("worker registry unavailable", error=str(error))
            return
        if workers and not any(worker.languages for worker in workers):
            raise Unavailable(
                "No worker has a sandbox to run programs", code="sandbox_unavailable", retry_after=HEARTBEAT_TTL_SECONDS
            )
        if workers and not any(language in worker.languages for worker in workers):
            raise ValidationFailed(f"No worker supports {language}", code="language_unavailable")


def _worker_key(worker: str) -> str:
    return f"{{jobs.workers}}:{worker}"
