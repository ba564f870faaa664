"""The hub of this process: its sockets, their rooms, and their periodic work (heartbeat, leases, token expiry)."""

import asyncio
import random
from collections.abc import Callable, Coroutine, Mapping
from datetime import UTC, datetime
from typing import Any
from uuid import UUID, uuid4

import structlog
from aiohttp import web
from redis.asyncio import Redis
from redis.exceptions import RedisError

from server import loop
from server.errors import Conflict, Unavailable
from server.postgres import Database
from server.realtime.access_monitor import AccessMonitor
from server.realtime.background import run_forever
from server.realtime.channels import CONTROL_CHANNEL, DROPPABLE, Channels, event_body, event_frame, user_channel
from server.realtime.connection import CLOSE_HANDSHAKE_TIMEOUT_SECONDS, Connection
from server.realtime.cursors import CursorBroadcaster
from server.realtime.grants import ResourceRef
from server.realtime.history import Replay
from server.realtime.outbox import Delivery
from server.realtime.presence import RENEW_INTERVAL_SECONDS, Member, OnlineUser, PresenceRegistry
from server.realtime.protocol import PING_FRAME, encode, websocket_frame
from server.realtime.room import WorkspaceRoom
from server.realtime.socket_auth import SocketAuth
from server.realtime.subscriber import Subscriber
from server.realtime.table import MessageDef
from server.resources import translate_store_errors
from server.settings import Settings

log = structlog.get_logger()

HEARTBEAT_INTERVAL_SECONDS = 25.0
HEARTBEAT_CHECK_INTERVAL_SECONDS = 0.5
TOKEN_EXPIRY_WARNING_SECONDS = 60.0
MAX_BATCH = 200
MAX_ROOMS_PER_CONNECTION = 200  # workspaces and documents of one connection
MAX_RECONNECT_DELAY_MILLISECONDS = 3000  # jitter: clients of a stopping process spread their reconnects over it
CLOSE_RESTARTING = 1012, "restarting"  # close code and reason for sockets when the process stops
DRAIN_NOTICE_SECONDS = 0.2  # from server:draining to the first close
MIN_CLOSE_BATCH = 50
CLOSE_INTERVAL_SECONDS = 0.05
STOP_TIMEOUT_SECONDS = 2 * CLOSE_HANDSHAKE_TIMEOUT_SECONDS + 0.5


class Realtime:
    """The hub of one process; ``app[REALTIME]``."""

    def __init__(
        self,
        settings: Settings,
        messages: Mapping[str, MessageDef],
        *,
        db: Database,
        redis: Redis,
        blocking_redis: Redis,
        channels: Channels,
        socket_auth: SocketAuth,
    ) -> None:
        self.settings = settings
        self.db = db
        self.messages = messages
        self.socket_auth = socket_auth
        self.draining = False
        self.frames_sent = 0  # a plain integer, read by the metrics: a Counter costs too much for each write
        self.channels = channels
        self.presence = PresenceRegistry(redis, process=uuid4().hex)
        self.cursors = CursorBroadcaster(channels)
        self.documents: Any = None  # documents.rooms.Rooms, for the messages of documents
        self.connections: dict[str, Connection] = {}
        self.unauthenticated: set[asyncio.Timeout] = set()
        """The authentication timeout of each socket that has not authenticated yet."""
        self.access_monitor = AccessMonitor(self.connections, socket_auth.recheck)
        self.subscriber = Subscriber(
            blocking_redis,
            channel=CONTROL_CHANNEL,
            control=self.access_monitor,
            recheck_all=self.access_monitor.recheck_all,
        )
        self._rooms: dict[UUID, WorkspaceRoom] = {}
        self._user_pushes: dict[UUID, UserPushes] = {}
        self._evictors: dict[str, Callable[[Connection, UUID], None]] = {"workspace": self._remove_member}
        self._pending_leaves: dict[tuple[UUID, str], asyncio.Task[None]] = {}  # not yet confirmed by Redis
        self._lease_expired: set[UUID] = set()  # workspaces where other processes removed this one's connections
        self._tasks: set[asyncio.Task[Any]] = set()
        self._background: list[asyncio.Task[None]] = []

    def spawn(self, coroutine: Coroutine[Any, Any, None]) -> "asyncio.Task[None]":
        """Run the coroutine in a task that is cancelled, at the latest, when the process stops."""
        task = asyncio.ensure_future(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._on_task_done)
        return task

    def on_evict(self, kind: str, callback: Callable[[Connection, UUID], None]) -> None:
        """Register a callback for a kind of resource: it removes a connection that closes or loses access."""
        self._evictors[kind] = callback

    @property
    def room_count(self) -> int:
        return len(self._rooms)

    def outbox_totals(self) -> tuple[int, int]:
        """Return the number of frames and of bytes in all outboxes."""
        totals = [connection.outbox_size for connection in self.connections.values()]
        return sum(frames for frames, _ in totals), sum(size for _, size in totals)

    def start(self) -> None:
        for task in (
            self.subscriber.listen,
            self.access_monitor.run,
            self.cursors.run,
            self._renew_periodically,
            self._check_connections,
        ):
            self._background.append(self.spawn(run_forever(task)))

    # Sockets

    def register(self, connection: Connection, *, access_epoch: int) -> None:
        """Register a socket; ``access_epoch`` is ``access_monitor.epoch`` from before its authentication."""
        self.connections[connection.id] = connection
        if access_epoch != self.access_monitor.epoch:
            self.access_monitor.mark_stale(connection)

    async def subscribe_user(self, connection: Connection) -> None:
        """Subscribe to the pushes of the connection's user; it receives them from its registration on."""
        user = connection.user.id
        pushes = self._user_pushes.setdefault(user, UserPushes(self.connections))
        pushes.connections.add(connection)
        try:
            await self.subscriber.subscribe(user_channel(user), pushes)
        except Unavailable:
            return  # the pushes are received once Redis is available again

    def unregister(self, connection: Connection) -> None:
        """Unregister a socket: remove it from all rooms, documents and subscriptions now."""
        self.connections.pop(connection.id, None)
        for resource in list(connection.grants):
            del connection.grants[resource]
            self.evict(connection, resource)
        pushes = self._user_pushes.get(connection.user.id)
        if pushes is not None:
            pushes.connections.discard(connection)
            if not pushes.connections:
                del self._user_pushes[connection.user.id]
                self.subscriber.unsubscribe(user_channel(connection.user.id), pushes)

    def evict(self, connection: Connection, resource: ResourceRef) -> None:
        """Remove a connection from a room or document after its grant has ended, see ``on_evict``."""
        self._evictors[resource.kind](connection, resource.id)

    async def drain(self) -> None:
        """Drain all sockets for a graceful shutdown: close each with 1012 within DRAIN_SECONDS, in batches."""
        self._reject_unauthenticated()
        deadline = asyncio.get_running_loop().time() + self.settings.drain_seconds
        connections = list(self.connections.values())
        for connection in connections:
            milliseconds = random.randint(0, MAX_RECONNECT_DELAY_MILLISECONDS)  # noqa: S311 - spreads load
            connection.send_drain_notice(websocket_frame(encode("server:draining", {"reconnectAfterMs": milliseconds})))
        if connections:
            await asyncio.sleep(min(DRAIN_NOTICE_SECONDS, self.settings.drain_seconds / 4))
        batches = max(1, round(self.settings.drain_seconds / 2 / CLOSE_INTERVAL_SECONDS))
        batch_size = max(MIN_CLOSE_BATCH, -(-len(connections) // batches))
        while self.connections and asyncio.get_running_loop().time() < deadline:
            for connection in list(self.connections.values())[:batch_size]:
                connection.close_after_reply(*CLOSE_RESTARTING)
            await asyncio.sleep(CLOSE_INTERVAL_SECONDS)

    async def stop(self) -> None:
        """Close the remaining sockets with 1012 and end all tasks."""
        self._reject_unauthenticated()
        for connection in list(self.connections.values()):
            connection.close(*CLOSE_RESTARTING)
        finite = [task for task in self._tasks if task not in self._background]
        if finite:
            await asyncio.wait(finite, timeout=STOP_TIMEOUT_SECONDS)
        await loop.cancel_tasks(list(self._tasks))
        await self.channels.history.close()

    def _reject_unauthenticated(self) -> None:
        self.draining = True
        for timeout in self.unauthenticated:
            if not timeout.expired():
                timeout.reschedule(asyncio.get_running_loop().time())

    # Rooms

    async def join(
        self, connection: Connection, workspace: UUID, *, since: str | None
    ) -> tuple[Replay, list[OnlineUser]]:
        """Join a room; return the events after ``since`` and the users online.

        The connection does not join if the replay has ``more``: the client has to fetch the rest first.

        Raises:
            Unavailable: Redis is unavailable, or the join timed out.
            Conflict: the connection is in ``MAX_ROOMS_PER_CONNECTION`` rooms and documents.
        """
        resource = ResourceRef("workspace", workspace)
        member = Member(connection.id, connection.user.id, connection.name)
        room = self._rooms.get(workspace)
        if resource in connection.grants and since is None and room is not None:
            # It is a member already: register its presence, in case the lease has expired.
            replay, online = await self._register_presence(room, member, since=None)
            await room.wait_delivered(replay.last_event_id)
            return replay, online
        if resource not in connection.grants and len(connection.grants) >= MAX_ROOMS_PER_CONNECTION:
            raise Conflict(
                f"Connection exceeds the maximum of {MAX_ROOMS_PER_CONNECTION} joined workspaces and open documents"
            )
        await self._wait_left(workspace, connection)
        room = self._rooms.setdefault(
            workspace, WorkspaceRoom(workspace, self._restore_presence, self.subscriber.unavailable_error)
        )
        connection.grants.pop(resource, None)
        try:
            pending = await room.begin_join(connection)
            await self.subscriber.subscribe(room.channel, room)
            replay, online = await self._register_presence(room, member, since=since)
            if not replay.more:
                await pending.wait_for_marker()
        except BaseException:
            self._remove_member(connection, workspace)
            raise
        if replay.more or connection.close_code is not None:
            self._remove_member(connection, workspace)
        else:
            self.grant(connection, resource)
            connection.after_reply(lambda: room.finish_join(connection, last_event_id=replay.last_event_id))
        return replay, online

    async def _register_presence(
        self, room: WorkspaceRoom, member: Member, *, since: str | None
    ) -> tuple[Replay, list[OnlineUser]]:
        with translate_store_errors():
            replay, online, held = await self.presence.join(room.workspace, member, since=since)
        if not held and room.members:  # their presence was removed with the lease
            self._lease_expired.add(room.workspace)
        return replay, online

    async def leave(self, connection: Connection, workspace: UUID) -> None:
        """Leave a room.

        Raises:
            Unavailable: the connection has left, but Redis is unavailable: the leave event follows later.
        """
        if connection.grants.pop(ResourceRef("workspace", workspace), _MISSING) is not _MISSING:
            self._remove_member(connection, workspace)
            await self._wait_left(workspace, connection)

    async def announce(self, type: str, *, workspace: UUID, connection: Connection, **fields: Any) -> str:
        """Broadcast a durable event to the other members; return its id once all earlier events are sent here."""
        with translate_store_errors():
            id = await self.channels.announce(
                type, workspace=workspace, user=connection.user.id, name=connection.name, origin=connection.id, **fields
            )
        room = self._rooms.get(workspace)
        if room is not None:
            await room.wait_delivered(id)
        return id

    def update_cursor(self, workspace: UUID, connection: Connection, **fields: Any) -> None:
        """Broadcast a cursor to the other members of the room; ephemeral."""
        user, name = connection.user.id, connection.name
        body = event_body("CURSOR_UPDATE", workspace=workspace, user=user, name=name, **fields)
        self.cursors.update(workspace, connection.id, event_frame(body))

    def grant(self, connection: Connection, resource: ResourceRef) -> None:
        """Keep the access of the current message for later messages and events, until it changes."""
        connection.grants[resource] = connection.access
        if connection.access_epoch != self.access_monitor.epoch:
            # A notice of changed access arrived since this access was read.
            connection.grants[resource] = None
            self.access_monitor.mark_stale(connection)

    def _remove_member(self, connection: Connection, workspace: UUID) -> None:
        room = self._rooms.get(workspace)
        if room is not None:
            room.remove(connection)
            if room.is_empty:
                del self._rooms[workspace]
                self.subscriber.unsubscribe(room.channel, room)
        self.cursors.remove(workspace, connection.id)
        self._start_leave(workspace, connection.id)

    def _start_leave(self, workspace: UUID, connection: str) -> None:
        self._pending_leaves[workspace, connection] = self.spawn(self._leave_presence(workspace, connection))

    async def _wait_left(self, workspace: UUID, connection: Connection) -> None:
        """Wait until an earlier leave of the connection is confirmed; else leave and join could overtake each other.

        Raises:
            Unavailable: Redis has not confirmed the leave.
        """
        leaving = self._pending_leaves.get((workspace, connection.id))
        if leaving is not None:
            await asyncio.wait({leaving})
            if (workspace, connection.id) in self._pending_leaves:
                raise self.subscriber.unavailable_error()

    async def _leave_presence(self, workspace: UUID, connection: str) -> None:
        try:
            await self.cursors.wait_published()
            await self.presence.leave(workspace, connection=connection)
        except (RedisError, OSError) as error:
            log.debug("presence leave not published yet", error=str(error))
        else:
            self._pending_leaves.pop((workspace, connection), None)

    async def _restore_presence(self, room: WorkspaceRoom, marker: str) -> tuple[Replay, list[OnlineUser]]:
        members = room.present_members()
        try:
            return await self.presence.restore(room.workspace, members, since=room.last_event_id or None, marker=marker)
        finally:
            # The leave of a connection that left meanwhile may have run before the restore registered it again.
            before = {member.connection for member in members}
            for connection in before - {member.connection for member in room.present_members()}:
                self._start_leave(room.workspace, connection)

    # Periodic work

    async def _renew_periodically(self) -> None:
        """Renew this process's leases periodically, and detect killed processes by their expired leases."""
        while True:
            await asyncio.sleep(RENEW_INTERVAL_SECONDS)
            try:
                await self._renew_leases()
            except (RedisError, OSError) as error:
                log.warning("presence leases not renewed", error=str(error))

    async def _renew_leases(self) -> None:
        for (workspace, connection), leaving in list(self._pending_leaves.items()):
            if leaving.done():  # it failed: retry
                self._start_leave(workspace, connection)
        rooms = [workspace for workspace, room in self._rooms.items() if room.members]
        for start in range(0, len(rooms), MAX_BATCH):
            self._lease_expired.update(await self.presence.renew(rooms[start : start + MAX_BATCH]))
        for workspace in self._lease_expired & self._rooms.keys():
            self._rooms[workspace].on_disconnect()
        self._lease_expired.clear()
        for room in list(self._rooms.values()):
            if room.needs_resync and self.subscriber.is_live:  # not before all access is rechecked
                await self.subscriber.resync(room.channel, room)

    async def _check_connections(self) -> None:
        """Send heartbeats, warn of expiring tokens, and close silent sockets and those with an expired token."""
        while True:
            await asyncio.sleep(HEARTBEAT_CHECK_INTERVAL_SECONDS)
            now, utc_now = asyncio.get_running_loop().time(), datetime.now(UTC)
            for connection in list(self.connections.values()):
                _check_heartbeat(connection, now)
                _check_token_expiry(connection, utc_now)

    def _on_task_done(self, task: "asyncio.Task[Any]") -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            log.error("realtime task failed", error=repr(error))


class UserPushes:
    """A ``ChannelListener`` for the pushes to one user, on all their registered connections of this process."""

    def __init__(self, registered: Mapping[str, Connection]) -> None:
        self.connections: set[Connection] = set()
        self._registered = registered

    def deliver(self, _origin: str, kind: str, payload: bytes) -> None:
        frame = websocket_frame(payload)
        delivery = Delivery.DROPPABLE if kind == DROPPABLE else Delivery.DURABLE
        for connection in tuple(self.connections):
            if connection.id in self._registered:
                connection.write(frame, delivery)

    def on_disconnect(self) -> None:
        """Do nothing: these pushes are live only."""

    async def resync(self) -> None:
        """Do nothing: these pushes are live only."""


def _check_heartbeat(connection: Connection, now: float) -> None:
    if now - connection.last_received_at > 2 * HEARTBEAT_INTERVAL_SECONDS:
        connection.close(4408, "heartbeat timed out")
    elif now - connection.last_ping_at >= HEARTBEAT_INTERVAL_SECONDS:
        connection.last_ping_at = now
        connection.write(PING_FRAME, Delivery.DROPPABLE)


def _check_token_expiry(connection: Connection, utc_now: datetime) -> None:
    seconds_left = (connection.user.expires_at - utc_now).total_seconds()
    if seconds_left <= 0:
        connection.close(4401, "token expired")
    elif seconds_left <= TOKEN_EXPIRY_WARNING_SECONDS and not connection.expiry_warned:
        connection.expiry_warned = True
        connection.send(encode("token:expiring", {"tokenExpiresAt": connection.user.expires_at}))


REALTIME = web.AppKey("realtime", Realtime)
_MISSING = object()
