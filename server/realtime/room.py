"""A workspace in this process: who of its members is connected here, and the order in which they are told.

Members hear every event once and in order, also around the moments at which that is hard: when somebody enters,
and when the subscription was lost. For both, Redis reads what was missed and publishes a mark, at one moment;
until the mark is heard all is history, after it all is news, which is kept until the history has been sent.
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
KEPT_MESSAGES = 1000  # while somebody enters; more, and they must try again
_DELIVERY = {NEWEST: Delivery.NEWEST, DROPPABLE: Delivery.DROPPABLE}


class Message(NamedTuple):
    origin: str
    kind: str
    frame: bytes


class Arrival:
    """Somebody who enters: deaf until their mark, then everything is kept for them until they are in."""

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
        """Raises Unavailable where the subscription was lost since."""
        if self._broken:
            raise self._failure()

    async def history_is_complete(self) -> None:
        """Returns when the mark was heard. Nothing may be awaited between this and ``admit``.

        Raises:
            Unavailable: it was not in time, or too much has happened since.
        """
        try:
            async with asyncio.timeout(MARK_SECONDS):
                await self._decided.wait()
        except TimeoutError:
            raise self._failure() from None
        self.demand_touch()
        if len(self.kept) > KEPT_MESSAGES:
            raise Unavailable("Too much is happening in this workspace")


Restore = Callable[["Room", str], Awaitable[tuple[Replay, list[Online]]]]


class Room:
    """A ``Listener`` of its workspace's channel."""

    def __init__(self, workspace: UUID, restore: Restore, failure: Callable[[], Unavailable]) -> None:
        """``failure`` tells what is wrong with Redis, for those who cannot enter."""
        self.workspace = workspace
        self._failure = failure
        self.channel = room_channel(workspace)
        self.members: dict[str, Connection] = {}
        self.last = ""  # the newest durable event that the members have been sent
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
        """Whether it is out of touch, and nobody is about to change that."""
        return not self._whole.is_set() and not self._restoring.locked()

    def people(self) -> list[Member]:
        """Who must be known to be here: members, and those who enter."""
        return [Member(each.id, each.user.id, each.name) for each in (self.members | self._entering).values()]

    async def expect(self, connection: Connection) -> Arrival:
        """Somebody will enter; they hear nothing more until ``admit``. To be ended by ``admit`` or ``refuse``,
        also where this raises.

        Raises:
            Unavailable: the room is out of touch with Redis.
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
        """They are in, and told what happened since their mark; they know what came before it, up to ``last``."""
        arrival = self._arrivals.pop(connection.id, None)
        if arrival is None:  # they left while they were answered
            return
        del self._entering[connection.id]
        self.last = self.last or last
        self.members[connection.id] = connection
        for message in arrival.kept:
            self._tell(message, [connection])

    def refuse(self, connection: Connection) -> None:
        """They are out, or do not come in."""
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
        for arrival in self._arrivals.values():
            arrival.keep(message)
        if self._whole.is_set():
            self._tell(message, self.members.values())
            self._note(kind)

    async def passed(self, id: str) -> None:
        """Returns when the members here have been sent all that comes before this event.

        So an ack stands in its event's place in the order, and who resumes from it misses nothing.
        """
        if self.last and position(self.last) >= position(id):
            return
        passing = position(id), asyncio.get_running_loop().create_future()
        self._passing.add(passing)
        try:
            async with asyncio.timeout(MARK_SECONDS):
                await passing[1]
        except TimeoutError:
            return  # it is in the history, which is what an ack promises
        finally:
            self._passing.discard(passing)

    def interrupt(self) -> None:
        self._whole.clear()
        for arrival in self._arrivals.values():
            arrival.give_up()

    async def resume(self) -> None:
        """Bring the members up to date: what they missed, who is here now, then what has happened meanwhile.

        Once for each interruption, however many ask for it.
        """
        async with self._restoring:
            if self._whole.is_set():
                return
            if not self.members:
                self.last = ""
                self._whole.set()
                return
            token = uuid4().hex
            arrival = self._arrivals[token] = Arrival(self._failure)
            try:
                replay, online = await self._catch_up(token, arrival)
                await arrival.history_is_complete()
            finally:
                del self._arrivals[token]
            self._tell(Message("", "", self._resynced(replay, online)), self.members.values())
            self._whole.set()
            for message in arrival.kept:
                self._tell(message, self.members.values())
                self._note(message.kind)

    async def _catch_up(self, token: str, arrival: Arrival) -> tuple[Replay, list[Online]]:
        gap = False
        while True:
            replay, online = await self._restore(self, token)
            arrival.demand_touch()  # else a notice of who lost access may have been missed
            for entry in replay.entries:
                self._tell(_missed(entry), self.members.values())
                self._note(entry.id)
            gap = gap or replay.gap
            if not replay.more:
                self._pass(replay.last)
                return Replay(replay.last, [], gap=gap), online
            await asyncio.sleep(0)

    def _resynced(self, replay: Replay, online: list[Online]) -> bytes:
        data = {
            "workspaceId": self.workspace,
            "users": [each.shown() for each in online],
            "lastEventId": replay.last,
            "gap": replay.gap,
        }
        return websocket_frame(encode("workspace:resync", data))

    def _tell(self, message: Message, whom: Iterable[Connection]) -> None:
        origin, kind, frame = message
        delivery = _DELIVERY.get(kind, Delivery.DURABLE)
        key = (self.workspace, origin) if delivery is Delivery.NEWEST else None
        for connection in tuple(whom):
            if connection.id != origin:
                connection.write(frame, delivery, key)

    def _note(self, kind: str) -> None:
        """An event's place in the order has been passed."""
        if not kind or kind in _DELIVERY:
            return
        self._pass(kind)

    def _pass(self, id: str) -> None:
        self.last = id
        if self._passing:
            here = position(id)
            for awaited, passing in self._passing:
                if awaited <= here and not passing.done():
                    passing.set_result(None)


def _missed(entry: Entry) -> Message:
    return Message(entry.origin, entry.id, websocket_frame(event_frame(entry.event)))
