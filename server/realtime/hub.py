"""Who listens to what in this process. A broadcast is encoded and framed once, whatever the number of receivers."""

import asyncio
from collections.abc import Callable, Coroutine, Mapping
from typing import Any
from uuid import UUID, uuid4

from redis.asyncio import Redis

from server.postgres import Executor
from server.realtime.channels import Channels, channel_of, event_body, event_frame, leave_head
from server.realtime.connection import Connection
from server.realtime.history import History
from server.realtime.presence import RENEW_SECONDS, Online, Presence
from server.realtime.protocol import websocket_frame
from server.realtime.table import Message
from server.resources import reported
from server.settings import Settings


class Realtime:
    """The sockets of one process and the rooms they are in."""

    def __init__(
        self, settings: Settings, db: Executor, redis: Redis, subscriber: Redis, messages: Mapping[str, Message]
    ) -> None:
        self.settings = settings
        self.db = db
        self.messages = messages
        self.connections: dict[str, Connection] = {}
        self.history = History(redis, most=settings.history_events)
        self.channels = Channels(subscriber, self.history, deliver=self.deliver)
        self.presence = Presence(redis, process=uuid4().hex)
        self._rooms: dict[UUID, set[Connection]] = {}
        self._tasks: set[asyncio.Task[Any]] = set()

    def own(self, coroutine: Coroutine[Any, Any, None]) -> "asyncio.Task[None]":
        """Run it in a task that is cancelled, at the latest, when the process stops."""
        task = asyncio.ensure_future(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    def start(self) -> None:
        self.own(self.channels.listen())
        self.own(self._renew())

    async def stop(self) -> None:
        """Close every socket with 1012 and end all tasks."""
        for connection in list(self.connections.values()):
            connection.close(1012, "restarting")
        closing = asyncio.gather(*(self.forget(each) for each in list(self.connections.values())))
        await asyncio.wait([asyncio.ensure_future(closing)], timeout=self.settings.drain_seconds)
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def join(self, connection: Connection, workspace: UUID) -> tuple[list[Online], str]:
        """Put a connection into a room: who is here now, and the id of the newest event."""
        with reported():
            await self.channels.subscribe(workspace)
            # In the room before its history is read: an event in between would reach nobody.
            self._rooms.setdefault(workspace, set()).add(connection)
            connection.rooms.add(workspace)
            last = await self.history.last(workspace)
            body = event_body("USER_JOIN", workspace=workspace, user=connection.user.id, name=connection.name)
            online = await self.presence.join(
                workspace,
                connection=connection.id,
                user=connection.user.id,
                name=connection.name,
                channel=channel_of(workspace),
                event=event_frame(body),
                leave_head=leave_head(workspace),
            )
        return online, last

    async def leave(self, connection: Connection, workspace: UUID) -> None:
        if workspace not in connection.rooms:
            return
        connection.rooms.discard(workspace)
        members = self._rooms[workspace]
        members.discard(connection)
        with reported():
            await self.presence.leave(
                workspace,
                connection=connection.id,
                channel=channel_of(workspace),
                leave_head=leave_head(workspace),
            )
            if not members and self._rooms.get(workspace) is members:
                del self._rooms[workspace]
                await self.channels.unsubscribe(workspace)

    async def forget(self, connection: Connection) -> None:
        """A connection is gone: out of every room."""
        self.connections.pop(connection.id, None)
        for workspace in list(connection.rooms):
            await self.leave(connection, workspace)

    def deliver(self, workspace: UUID, origin: str, _: str, payload: bytes) -> None:
        frame = websocket_frame(payload)
        for connection in tuple(self._rooms.get(workspace, ())):
            if connection.id != origin:
                connection.send(payload, frame)

    async def _renew(self) -> None:
        """Keep this process's leases, and notice processes that were killed."""
        while True:
            await asyncio.sleep(RENEW_SECONDS)
            await asyncio.gather(*map(self._renew_room, list(self._rooms)), return_exceptions=True)

    async def _renew_room(self, workspace: UUID) -> None:
        await self.presence.renew(workspace, channel=channel_of(workspace), leave_head=leave_head(workspace))


Authorize = Callable[[Connection, Message, dict[str, Any]], Coroutine[Any, Any, None]]
