"""Cursors: of each sender the newest, at most CURSORS_PER_SECOND; what a cursor was in between reaches nobody."""

import asyncio
from typing import Any
from uuid import UUID

import structlog
from redis.asyncio import Redis
from redis.exceptions import RedisError

from server.realtime.channels import NEWEST, message, room_channel

log = structlog.get_logger()

CURSORS_PER_SECOND = 30
AT_ONCE = 500


class Cursors:
    """One beat for all cursors of the process, and one round trip a beat."""

    def __init__(self, redis: Redis) -> None:
        self._redis: Any = redis
        self._newest: dict[tuple[UUID, str], bytes] = {}
        self._moved = asyncio.Event()

    def move(self, workspace: UUID, connection: str, frame: bytes) -> None:
        self._newest[workspace, connection] = frame
        self._moved.set()

    def forget(self, workspace: UUID, connection: str) -> None:
        """They left: their cursor must not come after that."""
        self._newest.pop((workspace, connection), None)

    async def run(self) -> None:
        while True:
            await self._moved.wait()
            self._moved.clear()
            newest, self._newest = [*self._newest.items()], {}
            for start in range(0, len(newest), AT_ONCE):
                await self._publish(newest[start : start + AT_ONCE])
            await asyncio.sleep(1 / CURSORS_PER_SECOND)

    async def _publish(self, cursors: list[tuple[tuple[UUID, str], bytes]]) -> None:
        try:
            async with self._redis.pipeline(transaction=False) as pipeline:
                for (workspace, connection), frame in cursors:
                    pipeline.publish(room_channel(workspace), message(frame, origin=connection, kind=NEWEST))
                await pipeline.execute()
        except (RedisError, OSError) as error:
            log.debug("cursors not published", error=str(error))
