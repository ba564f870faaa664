"""The room of a workspace in this process: its connected members, and the order in which they receive events.

Members receive every event exactly once and in order, even when a connection joins or the subscription is lost. In
both cases one Redis script reads the missed events and publishes a marker, atomically. Messages before the marker are
in the history; messages after it are new and stay buffered until the history is sent.
"""

import asyncio
from collections.abc import Awaitable, Callable, Iterable
from typing import NamedTuple
from uuid import UUID, uuid4

from server.errors import Unavailable
from server.realtime.channels import DROPPABLE, MARK, NEWEST, event_frame, room_channel
from server.realtime.connection import Connection
from server.realtime.history import Entry, Replay, position
from server.realtime.outbox import Delivery
from server.realtime.presence import Member, Online
from server.realtime.protocol import encode, websocket_frame

MARK_SECONDS = 2.0
KEPT_MESSAGES = 1000  # during a join; beyond that the client must retry
_DELIVERY = {NEWEST: Delivery.NEWEST, DROPPABLE: Delivery.DROPPABLE}


class Message(NamedTuple):
    origin: str
    kind: str
    frame: bytes


class Arrival:
    """A join in progress: ignores messages before its marker, then buffers them until the join finishes."""

    def __init__(self, failure: Callable[[], Unavailable]) -> None:
        self.kept: list[Message] = []
        self._failure = failure
        self._begun = False
        self._broken = False
        self._decided = asyncio.Event()

    def begin(self) -> None:
        self._begun = True
        self._decided.set()

    def give_up(self) -> None:
        self._broken = True
        self._decided.set()

    def keep(self, message: Message) -> None:
        if self._begun:
            self.kept.append(message)

    def demand_touch(self) -> None:
        """Raise Unavailable if the subscription was lost since the join began."""
        if self._broken:
            raise self._failure()

    async def history_is_complete(self) -> None:
        """Wait for the marker. Nothing may be awaited between this and ``finish_join``.

        Raises:
            Unavailable: the marker did not come in time, or too many messages are buffered.
        """
        try:
            async with asyncio.timeout(MARK_SECONDS):
                await self._decided.wait()
        except TimeoutError:
            raise self._failure() from None
        self.demand_touch()
        if len(self.kept) > KEPT_MESSAGES:
            raise Unavailable(f"Workspace is too busy: more than {KEPT_MESSAGES} messages during the join")


Restore = Callable[["Room", str], Awaitable[tuple[Replay, list[Online]]]]


class Room:
    """A ``ChannelListener`` of its workspace's channel."""

    def __init__(self, workspace: UUID, restore: Restore, failure: Callable[[], Unavailable]) -> None:
        """``make_error`` returns the state of Redis as an error, for connections that cannot join."""
        self.workspace = workspace
        self._failure = failure
        self.channel = room_channel(workspace)
        self.members: dict[str, Connection] = {}
        self.last = ""  # the id of the newest durable event that was sent to the members
        self._arrivals: dict[str, Arrival] = {}
        self._entering: dict[str, Connection] = {}
        self._passing: set[tuple[tuple[int, int], asyncio.Future[None]]] = set()
        self._restore = restore
        self._restoring = asyncio.Lock()
        self._whole = asyncio.Event()
        self._whole.set()

    @property
    def empty(self) -> bool:
        return not self.members and not self._entering

    @property
    def stuck(self) -> bool:
        """Whether the room is out of sync with Redis and no resync is running."""
        return not self._whole.is_set() and not self._restoring.locked()

    def people(self) -> list[Member]:
        """Return the connections that presence must know: members, and those that are joining."""
        connections = (self.members | self._entering).values()
        return [Member(connection.id, connection.user.id, connection.name) for connection in connections]

    async def expect(self, connection: Connection) -> Arrival:
        """Begin a join; the connection receives nothing until ``finish_join``.

        The caller must end the join by ``finish_join`` or ``remove``, even if this raises.

        Raises:
            Unavailable: the room is out of sync with Redis.
        """
        self.members.pop(connection.id, None)
        self._entering[connection.id] = connection
        try:
            async with asyncio.timeout(MARK_SECONDS):
                await self._whole.wait()
        except TimeoutError:
            raise self._failure() from None
        return self._arrivals.setdefault(connection.id, Arrival(self._failure))

    def admit(self, connection: Connection, *, last: str) -> None:
        """Finish a join and send the messages since its marker; the client has all events up to ``last_event_id``."""
        pending = self._arrivals.pop(connection.id, None)
        if pending is None:  # the connection left before the reply was sent
            return
        del self._entering[connection.id]
        self.last = self.last or last
        self.members[connection.id] = connection
        for message in pending.kept:
            self._tell(message, [connection])

    def refuse(self, connection: Connection) -> None:
        """Remove a member, or abort its join."""
        self.members.pop(connection.id, None)
        self._arrivals.pop(connection.id, None)
        self._entering.pop(connection.id, None)

    def deliver(self, origin: str, kind: str, payload: bytes) -> None:
        if kind == MARK:
            if origin in self._arrivals:
                self._arrivals[origin].begin()
            if not payload:
                return
            kind = ""
        message = Message(origin, kind, websocket_frame(payload))
        for pending in self._arrivals.values():
            pending.keep(message)
        if self._whole.is_set():
            self._tell(message, self.members.values())
            self._note(kind)

    async def passed(self, id: str) -> None:
        """Wait until all earlier events are sent to the members here.

        So the ack takes its event's place in the order, and a client that resumes from it misses nothing.
        """
        if self.last and position(self.last) >= position(id):
            return
        waiter = position(id), asyncio.get_running_loop().create_future()
        self._passing.add(waiter)
        try:
            async with asyncio.timeout(MARK_SECONDS):
                await waiter[1]
        except TimeoutError:
            return  # the event is in the history, and the ack promises no more
        finally:
            self._passing.discard(waiter)

    def interrupt(self) -> None:
        self._whole.clear()
        for pending in self._arrivals.values():
            pending.give_up()

    async def resume(self) -> None:
        """Send the members the missed events, the users online, and then the messages since the marker.

        Concurrent calls resync only once per interruption.
        """
        async with self._restoring:
            if self._whole.is_set():
                return
            if not self.members:
                self.last = ""
                self._whole.set()
                return
            token = uuid4().hex
            pending = self._arrivals[token] = Arrival(self._failure)
            try:
                replay, online = await self._catch_up(token, pending)
                await pending.history_is_complete()
            finally:
                del self._arrivals[token]
            self._tell(Message("", "", self._resynced(replay, online)), self.members.values())
            self._whole.set()
            for message in pending.kept:
                self._tell(message, self.members.values())
                self._note(message.kind)

    async def _catch_up(self, token: str, pending: Arrival) -> tuple[Replay, list[Online]]:
        gap = False
        while True:
            replay, online = await self._restore(self, token)
            pending.demand_touch()  # else a revocation of access may have been missed
            for event in replay.entries:
                self._tell(_missed(event), self.members.values())
                self._note(event.id)
            gap = gap or replay.gap
            if not replay.more:
                self._pass(replay.last)
                return Replay(replay.last, [], gap=gap), online
            await asyncio.sleep(0)

    def _resynced(self, replay: Replay, online: list[Online]) -> bytes:
        data = {
            "workspaceId": self.workspace,
            "users": [user.shown() for user in online],
            "lastEventId": replay.last,
            "gap": replay.gap,
        }
        return websocket_frame(encode("workspace:resync", data))

    def _tell(self, message: Message, recipients: Iterable[Connection]) -> None:
        origin, kind, frame = message
        delivery = _DELIVERY.get(kind, Delivery.DURABLE)
        key = (self.workspace, origin) if delivery is Delivery.NEWEST else None
        for connection in tuple(recipients):
            if connection.id != origin:
                connection.write(frame, delivery, key)

    def _note(self, kind: str) -> None:
        """Record that a durable event was sent; all other kinds are ignored."""
        if not kind or kind in _DELIVERY:
            return
        self._pass(kind)

    def _pass(self, id: str) -> None:
        self.last = id
        if self._passing:
            sent = position(id)
            for awaited, delivered in self._passing:
                if awaited <= sent and not delivered.done():
                    delivered.set_result(None)


def _missed(event: Entry) -> Message:
    return Message(event.origin, event.id, websocket_frame(event_frame(event.event)))
