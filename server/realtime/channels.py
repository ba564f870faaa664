"""Redis pub/sub: one subscription of this process, to the channels of rooms that it has members in.

``announce`` is the only way to tell others. A message is ``origin \\n event id or nothing \\n frame``; the
origin is the connection that caused it, which does not hear its own echo.
"""

import asyncio
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any
from uuid import UUID

import structlog
from redis.asyncio import Redis
from redis.exceptions import RedisError

from server import json
from server.realtime.history import History

log = structlog.get_logger()

SUBSCRIBE_SECONDS = 2.0
RECONNECT_SECONDS = 0.2
LONGEST_RECONNECT_SECONDS = 3.0
_IDLE = "realtime:idle"  # a subscription needs at least one channel

Deliver = Callable[[UUID, str, str, bytes], None]


def channel_of(workspace: UUID) -> str:
    return f"ws:{workspace}"


def event_body(type: str, *, workspace: UUID, user: UUID, name: str, **more: Any) -> bytes:
    """The JSON object of an event, but for its id. What a client sent stands behind our own fields."""
    body = {
        **more,
        "type": type,
        "workspaceId": workspace,
        "userId": user,
        "userName": name,
        "timestamp": datetime.now(UTC),
    }
    return json.dumps(body)


def event_frame(body: bytes) -> bytes:
    return b'{"event":"collaboration:event","data":' + body + b"}"


def leave_head(workspace: UUID) -> bytes:
    """A USER_LEAVE frame up to the user's id; the script that counts fills in who it was."""
    start = json.dumps({"type": "USER_LEAVE", "workspaceId": workspace, "timestamp": datetime.now(UTC)})
    return b'{"event":"collaboration:event","data":' + start[:-1] + b',"userId":"'


class Channels:
    """``own`` takes tasks under its care; ``deliver`` is told (workspace, origin, event id, frame)."""

    def __init__(self, redis: Redis, history: History, *, deliver: Deliver) -> None:
        self._redis = redis
        self._history = history
        self._deliver = deliver
        self._wanted: dict[str, UUID] = {}
        self._confirmed: dict[str, asyncio.Future[None]] = {}
        self._pubsub: Any = None

    async def announce(
        self, type: str, *, workspace: UUID, user: UUID, name: str, origin: str = "", **more: Any
    ) -> str:
        """Tell everybody in the workspace, for good: the event's id, once it is in the history."""
        body = event_body(type, workspace=workspace, user=user, name=name, **more)
        return await self._history.append(workspace, channel=channel_of(workspace), origin=origin, body=body)

    async def subscribe(self, workspace: UUID) -> None:
        """Returns when Redis has confirmed: from now on nothing is missed.

        Raises:
            TimeoutError, RedisError: it has not in time.
        """
        channel = channel_of(workspace)
        if channel not in self._wanted:
            self._wanted[channel] = workspace
            self._confirmed[channel] = asyncio.get_running_loop().create_future()
            if self._pubsub is not None:
                await self._pubsub.subscribe(channel)
        async with asyncio.timeout(SUBSCRIBE_SECONDS):
            await asyncio.shield(self._confirmed[channel])

    async def unsubscribe(self, workspace: UUID) -> None:
        channel = channel_of(workspace)
        if self._wanted.pop(channel, None) is None:
            return
        self._confirmed.pop(channel).cancel()
        if self._pubsub is not None:
            await self._pubsub.unsubscribe(channel)

    async def listen(self) -> None:
        """Deliver what Redis brings, for as long as the process lives; connects again when Redis was away."""
        pause = RECONNECT_SECONDS
        while True:
            try:
                async with self._redis.pubsub() as pubsub:
                    await pubsub.subscribe(_IDLE, *self._wanted)
                    self._pubsub = pubsub
                    pause = RECONNECT_SECONDS
                    await self._read(pubsub)
            except (RedisError, OSError, TimeoutError) as error:
                log.warning("events interrupted", error=str(error), retry_in=pause)
            finally:
                self._pubsub = None
            await asyncio.sleep(pause)
            pause = min(pause * 2, LONGEST_RECONNECT_SECONDS)

    async def _read(self, pubsub: Any) -> None:
        while True:
            message = await pubsub.get_message(timeout=None)
            if message is None:
                continue
            channel = message["channel"].decode()
            if message["type"] == "subscribe":
                self._confirm(channel)
            elif message["type"] == "message" and channel in self._wanted:
                origin, id, frame = message["data"].split(b"\n", 2)
                self._deliver(self._wanted[channel], origin.decode(), id.decode(), frame)

    def _confirm(self, channel: str) -> None:
        confirmed = self._confirmed.get(channel)
        if confirmed is not None and not confirmed.done():
            confirmed.set_result(None)
