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
from server.realtime.channels import CONTROL, DROPPABLE, Channels, event_body, event_frame, user_channel
from server.realtime.connection import CLOSE_SECONDS, Connection
from server.realtime.cursors import Cursors
from server.realtime.doorman import Doorman
from server.realtime.endless import keep_running
from server.realtime.history import Replay
from server.realtime.outbox import Delivery
from server.realtime.peers import Thing
from server.realtime.presence import RENEW_SECONDS, Member, Online, Presence
from server.realtime.protocol import PING_FRAME, encode, websocket_frame
from server.realtime.room import Room
from server.realtime.standing import Standing
from server.realtime.subscriber import Subscriber
from server.realtime.table import Message
from server.resources import reported
from server.settings import Settings

log = structlog.get_logger()

HEARTBEAT_SECONDS = 25.0
WATCH_SECONDS = 0.5
EXPIRY_WARNING_SECONDS = 60.0
RENEWED_AT_ONCE = 200
MOST_ROOMS = 200  # workspaces and documents of one connection
RECONNECT_MILLISECONDS = 3000  # jitter: clients of a process that stops spread their reconnects over this time
RESTARTING = 1012, "restarting"  # close code and reason for sockets when the process stops
LAST_WORDS_SECONDS = 0.2  # from server:draining to the first close
CLOSED_AT_ONCE = 50
CLOSE_PAUSE_SECONDS = 0.05
STOP_SECONDS = 2 * CLOSE_SECONDS + 0.5


class Realtime:
    def __init__(
        self,
        settings: Settings,
        messages: Mapping[str, Message],
        *,
        db: Database,
        redis: Redis,
        blocking_redis: Redis,
        channels: Channels,
        doorman: Doorman,
    ) -> None:
        self.settings = settings
        self.db = db
        self.messages = messages
        self.doorman = doorman
        self.draining = False
        self.frames_sent = 0  # incremented by each write, which is too frequent for a metric
        self.channels = channels
        self.presence = Presence(redis, process=uuid4().hex)
        self.cursors = Cursors(channels)
        self.documents: Any = None  # documents.rooms.Rooms, for the messages of documents
        self.peers: dict[str, Connection] = {}
        self.strangers: set[asyncio.Timeout] = set()
        """The authentication timeout of each socket that has not authenticated yet."""
        self.standing = Standing(self.peers, doorman.recheck)
        self.subscriber = Subscriber(blocking_redis, channel=CONTROL, control=self.standing, vouch=self.standing.vouch)
        self._rooms: dict[UUID, Room] = {}
        self._users: dict[UUID, UserPushes] = {}
        self._evict: dict[str, Callable[[Connection, UUID], None]] = {"workspace": self._turn_out}
        self._departing: dict[tuple[UUID, str], asyncio.Task[None]] = {}  # not yet confirmed by Redis
        self._taken_for_dead: set[UUID] = set()  # workspaces where other processes removed this one's connections
        self._tasks: set[asyncio.Task[Any]] = set()
        self._forever: list[asyncio.Task[None]] = []

    def own(self, coroutine: Coroutine[Any, Any, None]) -> "asyncio.Task[None]":
        """Run the coroutine in a task that is cancelled, at the latest, when the process stops."""
        task = asyncio.ensure_future(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._finished)
        return task

    def on_evict(self, kind: str, do: Callable[[Connection, UUID], None]) -> None:
        """Register a callback for a kind of resource: it removes a connection that closes or loses access."""
        self._evict[kind] = do

    @property
    def room_count(self) -> int:
        return len(self._rooms)

    def waiting(self) -> tuple[int, int]:
        """Return the number of frames and of bytes in all outboxes."""
        totals = [connection.waiting for connection in self.peers.values()]
        return sum(frames for frames, _ in totals), sum(size for _, size in totals)

    def start(self) -> None:
        for task in (self.subscriber.listen, self.standing.run, self.cursors.run, self._renew, self._watch):
            self._forever.append(self.own(keep_running(task)))

    # Sockets

    def admit(self, connection: Connection, *, notices: int) -> None:
        """Register a socket; ``access_epoch`` is ``access_monitor.epoch`` from before its authentication."""
        self.peers[connection.id] = connection
        if notices != self.standing.notices:
            self.standing.doubt(connection)

    async def listen_for(self, connection: Connection) -> None:
        """Subscribe to the pushes of the connection's user; it receives them from its registration on."""
        user = connection.user.id
        pushes = self._users.setdefault(user, UserPushes(self.peers))
        pushes.connections.add(connection)
        try:
            await self.subscriber.subscribe(user_channel(user), pushes)
        except Unavailable:
            return  # received once Redis is available again

    def forget(self, connection: Connection) -> None:
        """Unregister a socket: remove it from all rooms, documents and subscriptions now."""
        self.peers.pop(connection.id, None)
        for resource in list(connection.grants):
            del connection.grants[resource]
            self.evict(connection, resource)
        pushes = self._users.get(connection.user.id)
        if pushes is not None:
            pushes.connections.discard(connection)
            if not pushes.connections:
                del self._users[connection.user.id]
                self.subscriber.unsubscribe(user_channel(connection.user.id), pushes)

    def evict(self, connection: Connection, resource: Thing) -> None:
        self._evict[resource.kind](connection, resource.id)

    async def drain(self) -> None:
        """Drain all sockets for a graceful shutdown: close each with 1012 within DRAIN_SECONDS, in batches."""
        self._turn_strangers_away()
        deadline = asyncio.get_running_loop().time() + self.settings.drain_seconds
        connections = list(self.peers.values())
        for connection in connections:
            milliseconds = random.randint(0, RECONNECT_MILLISECONDS)  # noqa: S311 - spreads load
            connection.announce_draining(websocket_frame(encode("server:draining", {"reconnectAfterMs": milliseconds})))
        if connections:
            await asyncio.sleep(min(LAST_WORDS_SECONDS, self.settings.drain_seconds / 4))
        batches = max(1, round(self.settings.drain_seconds / 2 / CLOSE_PAUSE_SECONDS))
        batch_size = max(CLOSED_AT_ONCE, -(-len(connections) // batches))
        while self.peers and asyncio.get_running_loop().time() < deadline:
            for connection in list(self.peers.values())[:batch_size]:
                connection.retire(*RESTARTING)
            await asyncio.sleep(CLOSE_PAUSE_SECONDS)

    async def stop(self) -> None:
        """Close the remaining sockets with 1012 and end all tasks."""
        self._turn_strangers_away()
        for connection in list(self.peers.values()):
            connection.close(*RESTARTING)
        finite = [task for task in self._tasks if task not in self._forever]
        if finite:
            await asyncio.wait(finite, timeout=STOP_SECONDS)
        await loop.end(list(self._tasks))
        await self.channels.history.close()

    def _turn_strangers_away(self) -> None:
        self.draining = True
        for timeout in self.strangers:
            if not timeout.expired():
                timeout.reschedule(asyncio.get_running_loop().time())

    # Rooms

    async def join(self, connection: Connection, workspace: UUID, *, since: str | None) -> tuple[Replay, list[Online]]:
        """Join a room; return the events after ``since`` and the users online.

        The connection does not join if the replay has ``more``: the client has to fetch the rest first.

        Raises:
            Unavailable: Redis is unavailable, or the join timed out.
            Conflict: the connection is in ``MAX_ROOMS_PER_CONNECTION`` rooms and documents.
        """
        resource = Thing("workspace", workspace)
        member = Member(connection.id, connection.user.id, connection.name)
        room = self._rooms.get(workspace)
        if resource in connection.grants and since is None and room is not None:
            replay, online = await self._count(room, member, since=None)
            await room.passed(replay.last)
            return replay, online
        if resource not in connection.grants and len(connection.grants) >= MOST_ROOMS:
            raise Conflict(f"Connection exceeds the maximum of {MOST_ROOMS} joined workspaces and open documents")
        await self._has_departed(workspace, connection)
        room = self._rooms.setdefault(workspace, Room(workspace, self._restore, self.subscriber.failure))
        connection.grants.pop(resource, None)
        try:
            pending = await room.expect(connection)
            await self.subscriber.subscribe(room.channel, room)
            replay, online = await self._count(room, member, since=since)
            if not replay.more:
                await pending.history_is_complete()
        except BaseException:
            self._turn_out(connection, workspace)
            raise
        if replay.more or connection.close_code is not None:
            self._turn_out(connection, workspace)
        else:
            self.grant(connection, resource)
            connection.after_answer(lambda: room.admit(connection, last=replay.last))
        return replay, online

    async def _count(self, room: Room, member: Member, *, since: str | None) -> tuple[Replay, list[Online]]:
        with reported():
            replay, online, held = await self.presence.join(room.workspace, member, since=since)
        if not held and room.members:  # their presence was removed with the lease
            self._taken_for_dead.add(room.workspace)
        return replay, online

    async def leave(self, connection: Connection, workspace: UUID) -> None:
        """Leave a room.

        Raises:
            Unavailable: the connection has left, but Redis is unavailable: the leave event follows later.
        """
        if connection.grants.pop(Thing("workspace", workspace), _NOTHING) is not _NOTHING:
            self._turn_out(connection, workspace)
            await self._has_departed(workspace, connection)

    async def announce(self, type: str, *, workspace: UUID, connection: Connection, **more: Any) -> str:
        """Broadcast a durable event to the other members; return its id once all earlier events are sent here."""
        with reported():
            id = await self.channels.announce(
                type, workspace=workspace, user=connection.user.id, name=connection.name, origin=connection.id, **more
            )
        room = self._rooms.get(workspace)
        if room is not None:
            await room.passed(id)
        return id

    def move_cursor(self, workspace: UUID, connection: Connection, **more: Any) -> None:
        """Broadcast a cursor to the other members of the room; ephemeral."""
        user, name = connection.user.id, connection.name
        body = event_body("CURSOR_UPDATE", workspace=workspace, user=user, name=name, **more)
        self.cursors.move(workspace, connection.id, event_frame(body))

    def grant(self, connection: Connection, resource: Thing) -> None:
        """Keep the access of the current message for later messages and events, until it changes."""
        connection.grants[resource] = connection.access
        if connection.notices != self.standing.notices:
            # A notice of changed access arrived since this access was read.
            connection.grants[resource] = None
            self.standing.doubt(connection)

    def _turn_out(self, connection: Connection, workspace: UUID) -> None:
        room = self._rooms.get(workspace)
        if room is not None:
            room.refuse(connection)
            if room.empty:
                del self._rooms[workspace]
                self.subscriber.unsubscribe(room.channel, room)
        self.cursors.forget(workspace, connection.id)
        self._depart(workspace, connection.id)

    def _depart(self, workspace: UUID, connection: str) -> None:
        self._departing[workspace, connection] = self.own(self._uncount(workspace, connection))

    async def _has_departed(self, workspace: UUID, connection: Connection) -> None:
        """Wait until an earlier leave of the connection is confirmed; else leave and join could overtake each other.

        Raises:
            Unavailable: Redis has not confirmed the leave.
        """
        departing = self._departing.get((workspace, connection.id))
        if departing is not None:
            await asyncio.wait({departing})
            if (workspace, connection.id) in self._departing:
                raise self.subscriber.failure()

    async def _uncount(self, workspace: UUID, connection: str) -> None:
        try:
            await self.cursors.settled()
            await self.presence.leave(workspace, connection=connection)
        except (RedisError, OSError) as error:
            log.debug("departure not told yet", error=str(error))
        else:
            self._departing.pop((workspace, connection), None)

    async def _restore(self, room: Room, marker: str) -> tuple[Replay, list[Online]]:
        members = room.people()
        try:
            return await self.presence.restore(room.workspace, members, since=room.last or None, mark=marker)
        finally:
            # The leave of a connection that left meanwhile may have run before the restore registered it again.
            before = {member.connection for member in members}
            for connection in before - {member.connection for member in room.people()}:
                self._depart(room.workspace, connection)

    # Time

    async def _renew(self) -> None:
        """Renew this process's leases periodically, and detect killed processes by their expired leases."""
        while True:
            await asyncio.sleep(RENEW_SECONDS)
            try:
                await self._renew_leases()
            except (RedisError, OSError) as error:
                log.warning("presence not renewed", error=str(error))

    async def _renew_leases(self) -> None:
        for (workspace, connection), departing in list(self._departing.items()):
            if departing.done():  # it failed: retry
                self._depart(workspace, connection)
        rooms = [workspace for workspace, room in self._rooms.items() if room.members]
        for start in range(0, len(rooms), RENEWED_AT_ONCE):
            self._taken_for_dead.update(await self.presence.renew(rooms[start : start + RENEWED_AT_ONCE]))
        for workspace in self._taken_for_dead & self._rooms.keys():
            self._rooms[workspace].interrupt()
        self._taken_for_dead.clear()
        for room in list(self._rooms.values()):
            if room.stuck and self.subscriber.serving:  # not before all access is rechecked
                await self.subscriber.resume(room.channel, room)

    async def _watch(self) -> None:
        """Send heartbeats, warn of expiring tokens, and close silent sockets and those with an expired token."""
        loop = asyncio.get_running_loop()
        while True:
            await asyncio.sleep(WATCH_SECONDS)
            now, clock = loop.time(), datetime.now(UTC)
            for connection in list(self.peers.values()):
                _check_pulse(connection, now)
                _check_token(connection, clock)

    def _finished(self, task: "asyncio.Task[Any]") -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            log.error("a task of the sockets died", error=repr(error))


class UserPushes:
    """A ``ChannelListener`` for the pushes to one user, on all their registered connections of this process."""

    def __init__(self, welcomed: Mapping[str, Connection]) -> None:
        self.connections: set[Connection] = set()
        self._welcomed = welcomed

    def deliver(self, _origin: str, kind: str, payload: bytes) -> None:
        frame = websocket_frame(payload)
        delivery = Delivery.DROPPABLE if kind == DROPPABLE else Delivery.DURABLE
        for connection in tuple(self.connections):
            if connection.id in self._welcomed:
                connection.write(frame, delivery)

    def interrupt(self) -> None:
        """Do nothing: these pushes are live only."""

    async def resume(self) -> None:
        """Do nothing: these pushes are live only."""


def _check_pulse(connection: Connection, now: float) -> None:
    if now - connection.heard_at > 2 * HEARTBEAT_SECONDS:
        connection.close(4408, "heartbeat timed out")
    elif now - connection.pinged_at >= HEARTBEAT_SECONDS:
        connection.pinged_at = now
        connection.write(PING_FRAME, Delivery.DROPPABLE)


def _check_token(connection: Connection, clock: datetime) -> None:
    seconds_left = (connection.user.expires_at - clock).total_seconds()
    if seconds_left <= 0:
        connection.close(4401, "token expired")
    elif seconds_left <= EXPIRY_WARNING_SECONDS and not connection.warned:
        connection.warned = True
        connection.send(encode("token:expiring", {"tokenExpiresAt": connection.user.expires_at}))


REALTIME = web.AppKey("realtime", Realtime)
_NOTHING = object()
