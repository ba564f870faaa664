"""Broadcast of cursor positions: at most ``MAX_CURSOR_UPDATES_PER_SECOND`` of each sender.

A newer position replaces one that has not been published yet.
"""

import asyncio
from collections.abc import Iterable
from uuid import UUID

import structlog
from redis.exceptions import RedisError

from server.realtime.channels import COALESCED, Channels, encode_message, workspace_channel

log = structlog.get_logger()

MAX_CURSOR_UPDATES_PER_SECOND = 30
MAX_BATCH = 500


class CursorBroadcaster:
    """Publishes all changed cursors of the process at each interval, in batches of one round trip."""

    def __init__(self, channels: Channels) -> None:
        self._channels = channels
        self._pending: dict[tuple[UUID, str], bytes] = {}
        self._updated = asyncio.Event()
        self._publishing = asyncio.Lock()

    def update(self, workspace: UUID, connection: str, frame: bytes) -> None:
        self._pending[workspace, connection] = frame
        self._updated.set()

    def remove(self, workspace: UUID, connection: str) -> None:
        """Drop the cursor of a connection that left: it must not be published after the leave event.

        A cursor that is being published already is not dropped; ``wait_published`` waits for it.
        """
        self._pending.pop((workspace, connection), None)

    async def wait_published(self) -> None:
        """Wait until no removed cursor is still being published."""
        async with self._publishing:
            return

    async def run(self) -> None:
        while True:
            await self._updated.wait()
            self._updated.clear()
            updated = [*self._pending]
            for start in range(0, len(updated), MAX_BATCH):
                async with self._publishing:
                    await self._publish(updated[start : start + MAX_BATCH])
            await asyncio.sleep(1 / MAX_CURSOR_UPDATES_PER_SECOND)

    async def _publish(self, updated: Iterable[tuple[UUID, str]]) -> None:
        cursors = [(key, frame) for key in updated if (frame := self._pending.pop(key, None)) is not None]
        try:
            await self._channels.publish_encoded(
                (workspace_channel(workspace), encode_message(frame, origin=connection, kind=COALESCED))
                for (workspace, connection), frame in cursors
            )
        except (RedisError, OSError) as error:
            log.debug("cursors not published", error=str(error))
