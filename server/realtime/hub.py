"""The sockets of this process: who they are, which rooms they are in, and what is owed to them over time."""

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
MOST_ROOMS = 200  # of one connection
RECONNECT_MILLISECONDS = 3000  # clients of a process that stops come back within this, not all at once
RESTARTING = 1012, "restarting"  # what sockets are closed with when the process stops
LAST_WORDS_SECONDS = 0.2  # between server:draining and the first close
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
        self.frames_sent = 0  # counted here by each write, which is too frequent for a metric
        self.channels = channels
        self.presence = Presence(redis, process=uuid4().hex)
        self.cursors = Cursors(channels)
        self.documents: Any = None  # documents.rooms.Rooms, for the messages that are about them
        self.peers: dict[str, Connection] = {}
        self.strangers: set[asyncio.Timeout] = set()
        """The patience with each socket that has not said yet who it is."""
        self.standing = Standing(self.peers, doorman.recheck)
        self.subscriber = Subscriber(blocking_redis, channel=CONTROL, control=self.standing, vouch=self.standing.vouch)
        self._rooms: dict[UUID, Room] = {}
        self._users: dict[UUID, UserPushes] = {}
        self._evict: dict[str, Callable[[Connection, UUID], None]] = {"workspace": self._turn_out}
        self._departing: dict[tuple[UUID, str], asyncio.Task[None]] = {}  # of whom Redis has not been told yet
        self._taken_for_dead: set[UUID] = set()  # workspaces in which others removed who is here
        self._tasks: set[asyncio.Task[Any]] = set()
        self._forever: list[asyncio.Task[None]] = []

    def own(self, coroutine: Coroutine[Any, Any, None]) -> "asyncio.Task[None]":
        """Run it in a task that is cancelled, at the latest, when the process stops."""
        task = asyncio.ensure_future(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._finished)
        return task

    def on_evict(self, kind: str, do: Callable[[Connection, UUID], None]) -> None:
        """``do`` takes a connection out of a thing of this kind, when it closes or its access has ended."""
        self._evict[kind] = do

    @property
    def room_count(self) -> int:
        return len(self._rooms)

    def waiting(self) -> tuple[int, int]:
        """Frames and bytes that slow sockets have not taken yet."""
        counted = [peer.waiting for peer in self.peers.values()]
        return sum(frames for frames, _ in counted), sum(size for _, size in counted)

    def start(self) -> None:
        for endless in (self.subscriber.listen, self.standing.run, self.cursors.run, self._renew, self._watch):
            self._forever.append(self.own(keep_running(endless)))

    # Sockets

    def admit(self, peer: Connection, *, notices: int) -> None:
        """A socket is here. ``notices`` is ``standing.notices`` as it was before it was authenticated."""
        self.peers[peer.id] = peer
        if notices != self.standing.notices:
            self.standing.doubt(peer)

    async def listen_for(self, connection: Connection) -> None:
        """From the moment at which it is admitted the connection hears what is told to its user."""
        user = connection.user.id
        pushes = self._users.setdefault(user, UserPushes(self.peers))
        pushes.connections.add(connection)
        try:
            await self.subscriber.subscribe(user_channel(user), pushes)
        except Unavailable:
            return  # heard as soon as Redis is back

    def forget(self, peer: Connection) -> None:
        """A socket is gone: out of everything, now."""
        self.peers.pop(peer.id, None)
        for thing in list(peer.grants):
            del peer.grants[thing]
            self.evict(peer, thing)
        pushes = self._users.get(peer.user.id)
        if pushes is not None:
            pushes.connections.discard(peer)
            if not pushes.connections:
                del self._users[peer.user.id]
                self.subscriber.unsubscribe(user_channel(peer.user.id), pushes)

    def evict(self, connection: Connection, thing: Thing) -> None:
        self._evict[thing.kind](connection, thing.id)

    async def drain(self) -> None:
        """Say goodbye to all sockets: within DRAIN_SECONDS each has been closed with 1012."""
        self._turn_strangers_away()
        deadline = asyncio.get_running_loop().time() + self.settings.drain_seconds
        peers = list(self.peers.values())
        for peer in peers:
            milliseconds = random.randint(0, RECONNECT_MILLISECONDS)  # noqa: S311 - spreads load
            peer.announce_draining(websocket_frame(encode("server:draining", {"reconnectAfterMs": milliseconds})))
        if peers:
            await asyncio.sleep(min(LAST_WORDS_SECONDS, self.settings.drain_seconds / 4))
        spread = max(1, round(self.settings.drain_seconds / 2 / CLOSE_PAUSE_SECONDS))
        at_once = max(CLOSED_AT_ONCE, -(-len(peers) // spread))
        while self.peers and asyncio.get_running_loop().time() < deadline:
            for peer in list(self.peers.values())[:at_once]:
                peer.retire(*RESTARTING)
            await asyncio.sleep(CLOSE_PAUSE_SECONDS)

    async def stop(self) -> None:
        """Close what is still open with 1012 and end all tasks."""
        self._turn_strangers_away()
        for peer in list(self.peers.values()):
            peer.close(*RESTARTING)
        ending = [task for task in self._tasks if task not in self._forever]
        if ending:
            await asyncio.wait(ending, timeout=STOP_SECONDS)
        await loop.end(list(self._tasks))
        await self.channels.history.close()

    def _turn_strangers_away(self) -> None:
        self.draining = True
        for patience in self.strangers:
            if not patience.expired():
                patience.reschedule(asyncio.get_running_loop().time())

    # Rooms

    async def join(self, connection: Connection, workspace: UUID, *, since: str | None) -> tuple[Replay, list[Online]]:
        """Enter a room: what was missed since that event, and who is here. Where more was missed, they are not in.

        Raises:
            Unavailable: Redis is away, or it took too long.
            Conflict: in too many rooms.
        """
        thing = Thing("workspace", workspace)
        member = Member(connection.id, connection.user.id, connection.name)
        room = self._rooms.get(workspace)
        if thing in connection.grants and since is None and room is not None:
            replay, online = await self._count(room, member, since=None)
            await room.passed(replay.last)
            return replay, online
        if thing not in connection.grants and len(connection.grants) >= MOST_ROOMS:
            raise Conflict("In too many workspaces and documents at once")
        await self._has_departed(workspace, connection)
        room = self._rooms.setdefault(workspace, Room(workspace, self._restore, self.subscriber.failure))
        connection.grants.pop(thing, None)
        try:
            arrival = await room.expect(connection)
            await self.subscriber.subscribe(room.channel, room)
            replay, online = await self._count(room, member, since=since)
            if not replay.more:
                await arrival.history_is_complete()
        except BaseException:
            self._turn_out(connection, workspace)
            raise
        if replay.more or connection.close_code is not None:
            self._turn_out(connection, workspace)
        else:
            self.grant(connection, thing)
            connection.after_answer(lambda: room.admit(connection, last=replay.last))
        return replay, online

    async def _count(self, room: Room, member: Member, *, since: str | None) -> tuple[Replay, list[Online]]:
        with reported():
            replay, online, held = await self.presence.join(room.workspace, member, since=since)
        if not held and room.members:  # who are not counted any more
            self._taken_for_dead.add(room.workspace)
        return replay, online

    async def leave(self, connection: Connection, workspace: UUID) -> None:
        """
        Raises:
            Unavailable: they are out, but Redis is away: others hear of it later.
        """
        if connection.grants.pop(Thing("workspace", workspace), _NOTHING) is not _NOTHING:
            self._turn_out(connection, workspace)
            await self._has_departed(workspace, connection)

    async def announce(self, type: str, *, workspace: UUID, connection: Connection, **more: Any) -> str:
        """Tell the others in the room, for good; the event's id once all that comes before it has been sent here."""
        with reported():
            id = await self.channels.announce(
                type, workspace=workspace, user=connection.user.id, name=connection.name, origin=connection.id, **more
            )
        room = self._rooms.get(workspace)
        if room is not None:
            await room.passed(id)
        return id

    def move_cursor(self, workspace: UUID, connection: Connection, **more: Any) -> None:
        """Show the others in the room where a cursor is; ephemeral."""
        user, name = connection.user.id, connection.name
        body = event_body("CURSOR_UPDATE", workspace=workspace, user=user, name=name, **more)
        self.cursors.move(workspace, connection.id, event_frame(body))

    def grant(self, connection: Connection, thing: Thing) -> None:
        """The access that the message in hand was allowed by holds for what comes after it, until it changes."""
        connection.grants[thing] = connection.access
        if connection.notices != self.standing.notices:
            # Somebody's access has changed since ours was asked for.
            connection.grants[thing] = None
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
        """Who was here before may come again when they are known to have gone: else the two would cross."""
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

    async def _restore(self, room: Room, mark: str) -> tuple[Replay, list[Online]]:
        people = room.people()
        try:
            return await self.presence.restore(room.workspace, people, since=room.last or None, mark=mark)
        finally:
            # Who has gone meanwhile may have been uncounted before they were counted here.
            for gone in {each.connection for each in people} - {each.connection for each in room.people()}:
                self._depart(room.workspace, gone)

    # Time

    async def _renew(self) -> None:
        """Keep this process's leases, and notice processes that were killed."""
        while True:
            await asyncio.sleep(RENEW_SECONDS)
            try:
                await self._renew_leases()
            except (RedisError, OSError) as error:
                log.warning("presence not renewed", error=str(error))

    async def _renew_leases(self) -> None:
        for (workspace, connection), departing in list(self._departing.items()):
            if departing.done():  # in vain
                self._depart(workspace, connection)
        rooms = [workspace for workspace, room in self._rooms.items() if room.members]
        for start in range(0, len(rooms), RENEWED_AT_ONCE):
            self._taken_for_dead.update(await self.presence.renew(rooms[start : start + RENEWED_AT_ONCE]))
        for workspace in self._taken_for_dead & self._rooms.keys():
            self._rooms[workspace].interrupt()
        self._taken_for_dead.clear()
        for room in list(self._rooms.values()):
            if room.stuck and self.subscriber.serving:  # not before everybody's access has been looked up
                await self.subscriber.resume(room.channel, room)

    async def _watch(self) -> None:
        """Heartbeats, and tokens that expire."""
        loop = asyncio.get_running_loop()
        while True:
            await asyncio.sleep(WATCH_SECONDS)
            now, clock = loop.time(), datetime.now(UTC)
            for peer in list(self.peers.values()):
                _check_pulse(peer, now)
                _check_token(peer, clock)

    def _finished(self, task: "asyncio.Task[Any]") -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            log.error("a task of the sockets died", error=repr(error))


class UserPushes:
    """A ``Listener`` of what is told to one user, at all their connections that were welcomed here."""

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
        """These pushes are live only."""

    async def resume(self) -> None:
        """These pushes are live only."""


def _check_pulse(connection: Connection, now: float) -> None:
    if now - connection.heard_at > 2 * HEARTBEAT_SECONDS:
        connection.close(4408, "silent")
    elif now - connection.pinged_at >= HEARTBEAT_SECONDS:
        connection.pinged_at = now
        connection.write(PING_FRAME, Delivery.DROPPABLE)


def _check_token(connection: Connection, clock: datetime) -> None:
    left = (connection.user.expires_at - clock).total_seconds()
    if left <= 0:
        connection.close(4401, "the token has expired")
    elif left <= EXPIRY_WARNING_SECONDS and not connection.warned:
        connection.warned = True
        connection.send(encode("token:expiring", {"tokenExpiresAt": connection.user.expires_at}))


REALTIME = web.AppKey("realtime", Realtime)
_NOTHING = object()
