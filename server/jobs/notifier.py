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

NOTIFICATION_CHANNEL = "jobs:bell"  # the name stays: processes of two versions share it during a rolling upgrade
RECONNECT_DELAY_SECONDS = 0.5
PING_INTERVAL_SECONDS = 2.0  # without a message; a connection that answers no ping within the same time is lost


async def publish_cancellation(redis: Redis, *, job: str) -> None:
    """Publish that a job is cancelled; log a failure, since the worker's lease check finds it too."""
    try:
        await redis.publish(NOTIFICATION_CHANNEL, job)
    except (RedisError, OSError) as error:
        log.warning("cancellation not published", job=job, error=str(error))


class JobNotifier:
    """A subscriber of the workers' channel.

    It sets ``work_available`` when a job is enqueued, and calls ``on_cancel`` with the id of each cancelled job.
    """

    def __init__(self, redis: Redis, *, on_cancel: Callable[[str], None]) -> None:
        self.work_available = asyncio.Event()
        self._redis = redis
        self._on_cancel = on_cancel

    async def listen(self) -> None:
        """Listen until cancelled; reconnect after an outage of Redis."""
        while True:
            try:
                async with self._redis.pubsub() as pubsub:
                    await pubsub.subscribe(NOTIFICATION_CHANNEL)
                    await self._receive(pubsub)
            except (RedisError, OSError, TimeoutError) as error:
                log.warning("job notifications interrupted", error=str(error), retry_in=RECONNECT_DELAY_SECONDS)
            await asyncio.sleep(RECONNECT_DELAY_SECONDS)

    async def _receive(self, pubsub: Any) -> None:
        pinged = False
        while True:
            message = await pubsub.get_message(timeout=PING_INTERVAL_SECONDS)
            if message is None and pinged:
                raise RedisConnectionError("Redis does not answer a ping")
            if message is None:
                await pubsub.ping()
            elif message["type"] == "message":
                self._notify(message["data"].decode())
            pinged = message is None

    def _notify(self, job: str) -> None:
        if job:
            self._on_cancel(job)
        else:
            self.work_available.set()
