"""One socket of the JSON door: who it is, where it is, and how frames get out to it."""

import asyncio
from collections.abc import Callable, Hashable
from typing import TYPE_CHECKING, Any
from uuid import UUID, uuid4

from aiohttp import web

from server import metrics
from server.realtime.channels import event_body, event_frame
from server.realtime.outbox import Delivery, Outbox
from server.realtime.peers import Revocation, Thing
from server.realtime.protocol import close_frame, close_reply, websocket_frame
from server.realtime.throttle import Throttle

if TYPE_CHECKING:
    from server.realtime.hub import Realtime

DIRECT_BYTES = 64 << 10  # a transport with less than this to send is written to at once
CLOSE_SECONDS = 2.0  # for a peer to take what waits for it, and again to answer the close frame
OVERLOADED, GONE = 1013, 1006


class Connection:
    """Frames are written straight to the transport while the peer keeps up; when it does not, they wait in
    the outbox, which one task empties and then ends. At the outbox's bound the connection ends."""

    __slots__ = (
        "__weakref__",
        "_afterwards",
        "_gone",
        "_outbox",
        "_request",
        "_retire",
        "_transport",
        "_writer",
        "access",
        "busy",
        "close_code",
        "grants",
        "heard_at",
        "id",
        "name",
        "notices",
        "pinged_at",
        "realtime",
        "throttle",
        "user",
        "warned",
    )

    def __init__(self, request: web.Request, realtime: "Realtime", *, user: Any, name: str, now: float) -> None:
        assert request.transport is not None
        settings = realtime.settings
        self.id = uuid4().hex
        self.realtime = realtime
        self.user = user  # rest.keys.User
        self.name = name
        self.grants: dict[Thing, Any] = {}
        self.access: Any = None  # projects.access.Access, for the message that is being handled
        self.notices = realtime.standing.notices  # as they were when that access was asked for
        self.close_code: int | None = None
        self.busy = False  # a message is being handled
        self.heard_at = self.pinged_at = now
        self.warned = False  # that the token expires
        self.throttle = Throttle(rate=settings.ws_frames_per_second, burst=settings.ws_burst, now=now)
        self._request = request
        self._transport = request.transport
        self._outbox: Outbox | None = None  # most peers never need it
        self._writer: asyncio.Task[None] | None = None
        self._retire: tuple[int, str] | None = None
        self._afterwards: list[Callable[[], None]] = []
        self._gone = asyncio.Event()

    @property
    def waiting(self) -> tuple[int, int]:
        """Frames and bytes in the outbox."""
        return (len(self._outbox), self._outbox.bytes) if self._outbox else (0, 0)

    def is_in(self, workspace: UUID) -> bool:
        return Thing("workspace", workspace) in self.grants

    def send(self, payload: bytes, delivery: Delivery = Delivery.DURABLE, key: Hashable = None) -> None:
        """Send one text frame."""
        self.write(websocket_frame(payload), delivery, key)

    def write(self, frame: bytes, delivery: Delivery = Delivery.DURABLE, key: Hashable = None) -> None:
        """Send a prebuilt frame; ``key`` names what a newer one of ``Delivery.NEWEST`` replaces."""
        if self.close_code is not None or self._transport.is_closing():
            return  # uvloop raises over a transport that is gone before its reader has noticed
        self.realtime.frames_sent += 1
        if self._writer is None and self._transport.get_write_buffer_size() < DIRECT_BYTES:
            self._transport.write(frame)
        else:
            self._wait_in_line(frame, delivery, key)

    def after_answer(self, do: Callable[[], None]) -> None:
        """Once the message that is being handled has been answered, and before anything else is sent."""
        self._afterwards.append(do)

    def answered(self) -> None:
        """The message has been answered, or will not be."""
        self.busy = False
        afterwards, self._afterwards = self._afterwards, []
        for do in afterwards:
            do()
        if self._retire is not None:
            self.close(*self._retire)

    def close(self, code: int, reason: str = "") -> None:
        """Leave every room at once and end: soon, and aborted when the peer does not read."""
        if self.close_code is None:
            self.close_code = code
            metrics.SOCKETS_CLOSED.labels(str(code)).inc()
            if code == OVERLOADED and self._outbox is not None:
                self._outbox.clear()
            self.realtime.forget(self)
            self.realtime.own(self._end(code, reason))

    def retire(self, code: int, reason: str = "") -> None:
        """End when the message that is being handled has been answered."""
        if self.busy:
            self._retire = (code, reason)
        else:
            self.close(code, reason)

    def lose(self, thing: Thing, why: Revocation) -> None:
        if thing not in self.grants:
            return
        del self.grants[thing]
        self.realtime.evict(self, thing)
        workspace = thing.id if thing.kind == "workspace" else None
        more = {"reason": why.reason} | ({} if workspace else {"documentId": str(thing.id)})
        self.send(event_frame(event_body("ACCESS_REVOKED", workspace=workspace, user=why.actor, name=why.name, **more)))

    def announce_draining(self, frame: bytes) -> None:
        self.write(frame)

    def closed_by_peer(self, code: int | None) -> None:
        """The peer has closed, or is gone (None)."""
        if self._outbox is not None:
            self._outbox.clear()
        if code is not None and self.close_code is None and not self._transport.is_closing():
            self._transport.write(close_frame(close_reply(code)))
            self._transport.close()  # once all has been taken, which may be never
            asyncio.get_running_loop().call_later(CLOSE_SECONDS, self._transport.abort)

    def ended(self) -> None:
        """Nothing will be read from the peer any more."""
        self._gone.set()
        if self.close_code is None:
            self.close_code = GONE
            metrics.SOCKETS_CLOSED.labels(str(GONE)).inc()
            self.realtime.forget(self)

    def _wait_in_line(self, frame: bytes, delivery: Delivery, key: Hashable) -> None:
        if self._outbox is None:
            settings = self.realtime.settings
            self._outbox = Outbox(most_frames=settings.ws_outbox_frames, most_bytes=settings.ws_outbox_bytes)
        if not self._outbox.put(frame, delivery, key):
            self.close(OVERLOADED, "too slow")
            return
        if self._outbox.dropped:
            metrics.FRAMES_DROPPED.labels("ephemeral").inc(self._outbox.dropped)
        if self._writer is None:
            self._writer = self.realtime.own(self._empty_outbox(self._outbox))

    async def _empty_outbox(self, outbox: Outbox) -> None:
        try:
            while outbox:
                await self._request.writer.drain()  # waits while the peer does not read
                self._transport.writelines(outbox.take(DIRECT_BYTES))
        except ConnectionError:
            outbox.clear()
        finally:
            self._writer = None

    async def _end(self, code: int, reason: str) -> None:
        try:
            if self._writer is not None:
                async with asyncio.timeout(CLOSE_SECONDS):
                    await self._writer
            if not self._transport.is_closing():
                self._transport.write(close_frame(code, reason))
            async with asyncio.timeout(CLOSE_SECONDS):
                await self._gone.wait()
        except TimeoutError:
            pass
        finally:
            self._transport.abort()
