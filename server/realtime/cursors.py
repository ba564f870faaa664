"""Broadcast of cursors: the newest of each sender, at most ``MAX_CURSOR_UPDATES_PER_SECOND``, none in between."""

import asyncio
from collections.abc import Iterable
from uuid import UUID

import structlog
from redis.exceptions import RedisError

from server.realtime.channels import NEWEST, Channels, message, room_channel

log = structlog.get_logger()

CURSORS_PER_SECOND = 30
AT_ONCE = 500


class Cursors:
    """A broadcaster with one interval for all cursors of the process, and one round trip per batch."""

    def __init__(self, channels: Channels) -> None:
        self._channels = channels
        self._newest: dict[tuple[UUID, str], bytes] = {}
        self._moved = asyncio.Event()
        self._publishing = asyncio.Lock()

    def move(self, workspace: UUID, connection: str, frame: bytes) -> None:
        self._newest[workspace, connection] = frame
        self._moved.set()

    def forget(self, workspace: UUID, connection: str) -> None:
        """Drop the cursor of a connection that left; it must not follow the leave event, see ``wait_published``."""
        self._newest.pop((workspace, connection), None)

    async def settled(self) -> None:
        """Wait until no removed cursor is still being published."""
        async with self._publishing:
            return

    async def run(self) -> None:
        while True:
            await self._moved.wait()
            self._moved.clear()
            updated = [*self._newest]
            for start in range(0, len(updated), AT_ONCE):
                async with self._publishing:
                    await self._publish(updated[start : start + AT_ONCE])
            await asyncio.sleep(1 / CURSORS_PER_SECOND)

    async def _publish(self, updated: Iterable[tuple[UUID, str]]) -> None:
        cursors = [(key, frame) for key in updated if (frame := self._newest.pop(key, None)) is not None]
        try:
            await self._channels.pass_on(
                (room_channel(workspace), message(frame, origin=connection, kind=NEWEST))
                for (workspace, connection), frame in cursors
            )
        except (RedisError, OSError) as error:
            log.debug("cursors not published", error=str(error))
