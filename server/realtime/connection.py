"""One socket of the JSON transport: its user, its grants, and the sending of frames under backpressure."""

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

DIRECT_BYTES = 64 << 10  # write directly to a transport whose buffer holds less than this
CLOSE_SECONDS = 2.0  # for the peer to read the outbox, and again to reply to the close frame
OVERLOADED, GONE = 1013, 1006


class Connection:
    """An authenticated socket, with an outbox for backpressure.

    Frames go directly to the transport while the peer keeps up. Otherwise they wait in the outbox; one task drains it
    and then ends. A full outbox closes the connection.
    """

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
        self.notices = realtime.standing.notices  # at the time when ``access`` was read
        self.close_code: int | None = None
        self.busy = False  # a message is being handled
        self.heard_at = self.pinged_at = now
        self.warned = False  # whether ``token:expiring`` was sent for the current token
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
        """Return the number of frames and of bytes in the outbox."""
        return (len(self._outbox), self._outbox.bytes) if self._outbox else (0, 0)

    def is_in(self, workspace: UUID) -> bool:
        return Thing("workspace", workspace) in self.grants

    def send(self, payload: bytes, delivery: Delivery = Delivery.DURABLE, key: Hashable = None) -> None:
        """Send one text frame."""
        self.write(websocket_frame(payload), delivery, key)

    def write(self, frame: bytes, delivery: Delivery = Delivery.DURABLE, key: Hashable = None) -> None:
        """Send a prebuilt frame; one of ``Delivery.COALESCED`` replaces a pending one with the same ``key``."""
        if self.close_code is not None or self._transport.is_closing():
            return  # uvloop raises when the transport has closed before its reader noticed
        self.realtime.frames_sent += 1
        if self._writer is None and self._transport.get_write_buffer_size() < DIRECT_BYTES:
            self._transport.write(frame)
        else:
            self._wait_in_line(frame, delivery, key)

    def after_answer(self, do: Callable[[], None]) -> None:
        """Call back after the reply to the message that is being handled, before any other frame is sent."""
        self._afterwards.append(do)

    def answered(self) -> None:
        """Run the ``after_reply`` callbacks: the reply has been sent, or there is none."""
        self.busy = False
        callbacks, self._afterwards = self._afterwards, []
        for callback in callbacks:
            callback()
        if self._retire is not None:
            self.close(*self._retire)

    def close(self, code: int, reason: str = "") -> None:
        """Leave every room now and start the close handshake; abort the transport if the peer does not read."""
        if self.close_code is None:
            self.close_code = code
            metrics.SOCKETS_CLOSED.labels(str(code)).inc()
            if code == OVERLOADED and self._outbox is not None:
                self._outbox.clear()
            self.realtime.forget(self)
            self.realtime.own(self._end(code, reason))

    def retire(self, code: int, reason: str = "") -> None:
        """Close after the reply to the message that is being handled; now if there is none."""
        if self.busy:
            self._retire = (code, reason)
        else:
            self.close(code, reason)

    def lose(self, resource: Thing, why: Revocation) -> None:
        """Revoke the access to a resource: leave it and send ACCESS_REVOKED."""
        if resource not in self.grants:
            return
        del self.grants[resource]
        self.realtime.evict(self, resource)
        workspace = resource.id if resource.kind == "workspace" else None
        more = {"reason": why.reason} | ({} if workspace else {"documentId": str(resource.id)})
        self.send(event_frame(event_body("ACCESS_REVOKED", workspace=workspace, user=why.actor, name=why.name, **more)))

    def announce_draining(self, frame: bytes) -> None:
        self.write(frame)

    def closed_by_peer(self, code: int | None) -> None:
        """Reply to the peer's close frame; ``code`` is None if the connection was lost without one."""
        if self._outbox is not None:
            self._outbox.clear()
        if code is not None and self.close_code is None and not self._transport.is_closing():
            self._transport.write(close_frame(close_reply(code)))
            self._transport.close()  # only after the peer has read everything, which it may never do
            asyncio.get_running_loop().call_later(CLOSE_SECONDS, self._transport.abort)

    def ended(self) -> None:
        """Unregister the connection: nothing more will be read from the peer."""
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
            self.close(OVERLOADED, "client reads too slowly")
            return
        if self._outbox.dropped:
            metrics.FRAMES_DROPPED.labels("ephemeral").inc(self._outbox.dropped)
        if self._writer is None:
            self._writer = self.realtime.own(self._empty_outbox(self._outbox))

    async def _empty_outbox(self, outbox: Outbox) -> None:
        try:
            while outbox:
                await self._request.writer.drain()  # backpressure: waits while the peer does not read
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
