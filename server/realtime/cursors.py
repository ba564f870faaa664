"""Cursors: of each sender the newest, at most CURSORS_PER_SECOND; what a cursor was in between reaches nobody."""

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
    """One beat for all cursors of the process, and one round trip a beat."""

    def __init__(self, channels: Channels) -> None:
        self._channels = channels
        self._newest: dict[tuple[UUID, str], bytes] = {}
        self._moved = asyncio.Event()
        self._publishing = asyncio.Lock()

    def move(self, workspace: UUID, connection: str, frame: bytes) -> None:
        self._newest[workspace, connection] = frame
        self._moved.set()

    def forget(self, workspace: UUID, connection: str) -> None:
        """They left: their cursor must not come after that, see ``settled``."""
        self._newest.pop((workspace, connection), None)

    async def settled(self) -> None:
        """Returns when no cursor that was forgotten is under way any more."""
        async with self._publishing:
            return

    async def run(self) -> None:
        while True:
            await self._moved.wait()
            self._moved.clear()
            moved = [*self._newest]
            for start in range(0, len(moved), AT_ONCE):
                async with self._publishing:
                    await self._publish(moved[start : start + AT_ONCE])
            await asyncio.sleep(1 / CURSORS_PER_SECOND)

    async def _publish(self, moved: Iterable[tuple[UUID, str]]) -> None:
        cursors = [(place, frame) for place in moved if (frame := self._newest.pop(place, None)) is not None]
        try:
            await self._channels.pass_on(
                (room_channel(workspace), message(frame, origin=connection, kind=NEWEST))
                for (workspace, connection), frame in cursors
            )
        except (RedisError, OSError) as error:
            log.debug("cursors not published", error=str(error))
