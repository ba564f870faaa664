"""Notifications for workers through Redis pub/sub: a message is available, or a job is cancelled.

They only reduce latency. A worker that misses one still polls every second: for messages and for lost claims.
"""

import asyncio
from collections.abc import Callable
from typing import Any

import structlog
from redis.asyncio import Redis
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import RedisError

log = structlog.get_logger()

BELL = "jobs:bell"
RECONNECT_SECONDS = 0.5
PING_SECONDS = 2.0  # without a message; a connection that answers no ping within the same time is lost


async def tell_cancelled(redis: Redis, *, job: str) -> None:
    """Publish that a job is cancelled; log a failure, since the worker's lease check finds it too."""
    try:
        await redis.publish(BELL, job)
    except (RedisError, OSError) as error:
        log.warning("cancel not told", job=job, error=str(error))


class Bell:
    """A subscriber of the workers' channel.

    It sets ``work_available`` when a message is sent, and calls ``on_cancel`` with the id of each cancelled job.
    """

    def __init__(self, redis: Redis, *, on_cancel: Callable[[str], None]) -> None:
        self.work = asyncio.Event()
        self._redis = redis
        self._on_cancel = on_cancel

    async def listen(self) -> None:
        """Listen until cancelled; reconnect after an outage of Redis."""
        while True:
            try:
                async with self._redis.pubsub() as pubsub:
                    await pubsub.subscribe(BELL)
                    await self._hear(pubsub)
            except (RedisError, OSError, TimeoutError) as error:
                log.warning("bell not heard", error=str(error), retry_in=RECONNECT_SECONDS)
            await asyncio.sleep(RECONNECT_SECONDS)

    async def _hear(self, pubsub: Any) -> None:
        pinged = False
        while True:
            message = await pubsub.get_message(timeout=PING_SECONDS)
            if message is None and pinged:
                raise RedisConnectionError("Redis does not answer a ping")
            if message is None:
                await pubsub.ping()
            elif message["type"] == "message":
                self._ring(message["data"].decode())
            pinged = message is None

    def _ring(self, job: str) -> None:
        if job:
            self._on_cancel(job)
        else:
            self.work.set()
