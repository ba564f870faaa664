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
from server.realtime.channels import COALESCED, DROPPABLE, MARKER, event_frame, workspace_channel
from server.realtime.connection import Connection
from server.realtime.history import Replay, StoredEvent, event_id_key
from server.realtime.outbox import Delivery
from server.realtime.presence import Member, OnlineUser
from server.realtime.protocol import encode, websocket_frame

MARKER_TIMEOUT_SECONDS = 2.0
MAX_BUFFERED_MESSAGES = 1000  # during a join; beyond that the client must retry
_DELIVERY = {COALESCED: Delivery.COALESCED, DROPPABLE: Delivery.DROPPABLE}


class ChannelMessage(NamedTuple):
    origin: str
    kind: str
    frame: bytes


class PendingJoin:
    """A join in progress: ignores messages before its marker, then buffers them until the join finishes."""

    def __init__(self, make_error: Callable[[], Unavailable]) -> None:
        self.buffered: list[ChannelMessage] = []
        self._make_error = make_error
        self._marker_seen = False
        self._aborted = False
        self._resolved = asyncio.Event()

    def on_marker(self) -> None:
        self._marker_seen = True
        self._resolved.set()

    def abort(self) -> None:
        self._aborted = True
        self._resolved.set()

    def buffer(self, message: ChannelMessage) -> None:
        if self._marker_seen:
            self.buffered.append(message)

    def raise_if_aborted(self) -> None:
        """Raise Unavailable if the subscription was lost since the join began."""
        if self._aborted:
            raise self._make_error()

    async def wait_for_marker(self) -> None:
        """Wait for the marker. Nothing may be awaited between this and ``finish_join``.

        Raises:
            Unavailable: the marker did not come in time, or too many messages are buffered.
        """
        try:
            async with asyncio.timeout(MARKER_TIMEOUT_SECONDS):
                await self._resolved.wait()
        except TimeoutError:
            raise self._make_error() from None
        self.raise_if_aborted()
        if len(self.buffered) > MAX_BUFFERED_MESSAGES:
            raise Unavailable(f"Workspace is too busy: more than {MAX_BUFFERED_MESSAGES} messages during the join")


RestorePresence = Callable[["WorkspaceRoom", str], Awaitable[tuple[Replay, list[OnlineUser]]]]
"""Register the room's members again and publish this marker, see ``PresenceRegistry.restore``."""


class WorkspaceRoom:
    """A ``ChannelListener`` of its workspace's channel."""

    def __init__(self, workspace: UUID, restore: RestorePresence, make_error: Callable[[], Unavailable]) -> None:
        """``make_error`` returns the state of Redis as an error, for connections that cannot join."""
        self.workspace = workspace
        self._make_error = make_error
        self.channel = workspace_channel(workspace)
        self.members: dict[str, Connection] = {}
        self.last_event_id = ""  # the id of the newest durable event that was sent to the members
        self._pending_joins: dict[str, PendingJoin] = {}
        self._joining: dict[str, Connection] = {}
        self._delivery_waiters: set[tuple[tuple[int, int], asyncio.Future[None]]] = set()
        self._restore = restore
        self._resync_lock = asyncio.Lock()
        self._in_sync = asyncio.Event()
        self._in_sync.set()

    @property
    def is_empty(self) -> bool:
        return not self.members and not self._joining

    @property
    def needs_resync(self) -> bool:
        """Whether the room is out of sync with Redis and no resync is running."""
        return not self._in_sync.is_set() and not self._resync_lock.locked()

    def present_members(self) -> list[Member]:
        """Return the connections that presence must know: members, and those that are joining."""
        connections = (self.members | self._joining).values()
        return [Member(connection.id, connection.user.id, connection.name) for connection in connections]

    async def begin_join(self, connection: Connection) -> PendingJoin:
        """Begin a join; the connection receives nothing until ``finish_join``.

        The caller must end the join by ``finish_join`` or ``remove``, even if this raises.

        Raises:
            Unavailable: the room is out of sync with Redis.
        """
        self.members.pop(connection.id, None)
        self._joining[connection.id] = connection
        try:
            async with asyncio.timeout(MARKER_TIMEOUT_SECONDS):
                await self._in_sync.wait()
        except TimeoutError:
            raise self._make_error() from None
        return self._pending_joins.setdefault(connection.id, PendingJoin(self._make_error))

    def finish_join(self, connection: Connection, *, last_event_id: str) -> None:
        """Finish a join and send the messages since its marker; the client has all events up to ``last_event_id``."""
        pending = self._pending_joins.pop(connection.id, None)
        if pending is None:  # the connection left before the reply was sent
            return
        del self._joining[connection.id]
        self.last_event_id = self.last_event_id or last_event_id
        self.members[connection.id] = connection
        for message in pending.buffered:
            self._fan_out(message, [connection])

    def remove(self, connection: Connection) -> None:
        """Remove a member, or abort its join."""
        self.members.pop(connection.id, None)
        self._pending_joins.pop(connection.id, None)
        self._joining.pop(connection.id, None)

    def deliver(self, origin: str, kind: str, payload: bytes) -> None:
        if kind == MARKER:
            if origin in self._pending_joins:
                self._pending_joins[origin].on_marker()
            if not payload:
                return
            kind = ""
        message = ChannelMessage(origin, kind, websocket_frame(payload))
        for pending in self._pending_joins.values():
            pending.buffer(message)
        if self._in_sync.is_set():
            self._fan_out(message, self.members.values())
            self._record_event(kind)

    async def wait_delivered(self, id: str) -> None:
        """Wait until this event and all earlier ones are sent to the members here, with a timeout.

        An ack that is sent then has the place of its event in the order, so a client that resumes from the event's id
        misses nothing.
        """
        if self.last_event_id and event_id_key(self.last_event_id) >= event_id_key(id):
            return
        waiter = event_id_key(id), asyncio.get_running_loop().create_future()
        self._delivery_waiters.add(waiter)
        try:
            async with asyncio.timeout(MARKER_TIMEOUT_SECONDS):
                await waiter[1]
        except TimeoutError:
            return  # the event is in the history, and the ack promises no more
        finally:
            self._delivery_waiters.discard(waiter)

    def on_disconnect(self) -> None:
        self._in_sync.clear()
        for pending in self._pending_joins.values():
            pending.abort()

    async def resync(self) -> None:
        """Send the members the missed events, the users online, and then the messages since the marker.

        Concurrent calls resync once per interruption.
        """
        async with self._resync_lock:
            if self._in_sync.is_set():
                return
            if not self.members:
                self.last_event_id = ""
                self._in_sync.set()
                return
            marker = uuid4().hex
            pending = self._pending_joins[marker] = PendingJoin(self._make_error)
            try:
                replay, online = await self._replay_missed(marker, pending)
                await pending.wait_for_marker()
            finally:
                del self._pending_joins[marker]
            self._fan_out(ChannelMessage("", "", self._resync_frame(replay, online)), self.members.values())
            self._in_sync.set()
            for message in pending.buffered:
                self._fan_out(message, self.members.values())
                self._record_event(message.kind)

    async def _replay_missed(self, marker: str, pending: PendingJoin) -> tuple[Replay, list[OnlineUser]]:
        gap = False
        while True:
            replay, online = await self._restore(self, marker)
            pending.raise_if_aborted()  # else a revocation of access may have been missed
            for event in replay.events:
                self._fan_out(_replayed_message(event), self.members.values())
                self._record_event(event.id)
            gap = gap or replay.gap
            if not replay.more:
                self._advance(replay.last_event_id)
                return Replay(replay.last_event_id, [], gap=gap), online
            await asyncio.sleep(0)

    def _resync_frame(self, replay: Replay, online: list[OnlineUser]) -> bytes:
        data = {
            "workspaceId": self.workspace,
            "users": [user.to_json() for user in online],
            "lastEventId": replay.last_event_id,
            "gap": replay.gap,
        }
        return websocket_frame(encode("workspace:resync", data))

    def _fan_out(self, message: ChannelMessage, recipients: Iterable[Connection]) -> None:
        origin, kind, frame = message
        delivery = _DELIVERY.get(kind, Delivery.DURABLE)
        key = (self.workspace, origin) if delivery is Delivery.COALESCED else None
        for connection in tuple(recipients):
            if connection.id != origin:
                connection.write(frame, delivery, key)

    def _record_event(self, kind: str) -> None:
        """Record that a durable event was sent; ``kind`` is its id. All other kinds are ignored."""
        if not kind or kind in _DELIVERY:
            return
        self._advance(kind)

    def _advance(self, id: str) -> None:
        self.last_event_id = id
        if self._delivery_waiters:
            sent = event_id_key(id)
            for awaited, delivered in self._delivery_waiters:
                if awaited <= sent and not delivered.done():
                    delivered.set_result(None)


def _replayed_message(event: StoredEvent) -> ChannelMessage:
    return ChannelMessage(event.origin, event.id, websocket_frame(event_frame(event.event)))
