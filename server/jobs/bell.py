"""What workers are told at once, through Redis pub/sub: there is work; that job is cancelled.

Only a quickener. Whoever missed it looks by itself: for messages every second, for lost claims too.
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
PING_SECONDS = 2.0  # after so much silence; who is silent for as long again is gone


async def tell_cancelled(redis: Redis, *, job: str) -> None:
    try:
        await redis.publish(BELL, job)
    except (RedisError, OSError) as error:
        log.warning("cancel not told", job=job, error=str(error))


class Bell:
    """``work`` is set when a message was sent; ``on_cancel`` is told which job is no longer wanted."""

    def __init__(self, redis: Redis, *, on_cancel: Callable[[str], None]) -> None:
        self.work = asyncio.Event()
        self._redis = redis
        self._on_cancel = on_cancel

    async def listen(self) -> None:
        """For as long as the worker lives; connects again when Redis was away."""
        while True:
            try:
                async with self._redis.pubsub() as pubsub:
                    await pubsub.subscribe(BELL)
                    await self._hear(pubsub)
            except (RedisError, OSError, TimeoutError) as error:
                log.warning("bell not heard", error=str(error), retry_in=RECONNECT_SECONDS)
            await asyncio.sleep(RECONNECT_SECONDS)

    async def _hear(self, pubsub: Any) -> None:
        asked = False
        while True:
            heard = await pubsub.get_message(timeout=PING_SECONDS)
            if heard is None and asked:
                raise RedisConnectionError("Redis is silent")
            if heard is None:
                await pubsub.ping()
            elif heard["type"] == "message":
                self._ring(heard["data"].decode())
            asked = heard is None

    def _ring(self, job: str) -> None:
        if job:
            self._on_cancel(job)
        else:
            self.work.set()
