"""One socket of ``/ws``: its user, its grants, and the sending of frames under backpressure."""

import asyncio
from collections.abc import Callable, Hashable
from typing import TYPE_CHECKING, Any
from uuid import UUID, uuid4

from aiohttp import web

from server import metrics
from server.realtime.channels import event_body, event_frame
from server.realtime.grants import ResourceRef, Revocation
from server.realtime.outbox import Delivery, Outbox
from server.realtime.protocol import close_frame, close_reply, websocket_frame
from server.realtime.throttle import Throttle

if TYPE_CHECKING:
    from server.realtime.hub import Realtime

MAX_DIRECT_WRITE_BYTES = 64 << 10  # write directly to a transport whose buffer holds less than this
CLOSE_HANDSHAKE_TIMEOUT_SECONDS = 2.0  # for the peer to read the outbox, and again to reply to the close frame
CLOSE_OVERLOADED = 1013
CLOSE_ABNORMAL = 1006  # never sent: the connection was lost or closed by the peer (RFC 6455, section 7.4.1)


class Connection:
    """An authenticated socket, with an outbox for backpressure.

    Frames go directly to the transport while the peer keeps up. Otherwise they wait in the outbox; one task drains it
    and then ends. A full outbox closes the connection.
    """

    __slots__ = (
        "__weakref__",
        "_after_reply",
        "_outbox",
        "_outbox_task",
        "_peer_closed",
        "_pending_close",
        "_request",
        "_transport",
        "access",
        "access_epoch",
        "busy",
        "close_code",
        "expiry_warned",
        "grants",
        "id",
        "last_ping_at",
        "last_received_at",
        "name",
        "realtime",
        "throttle",
        "user",
    )

    def __init__(self, request: web.Request, realtime: "Realtime", *, user: Any, name: str, now: float) -> None:
        assert request.transport is not None
        settings = realtime.settings
        self.id = uuid4().hex
        self.realtime = realtime
        self.user = user  # rest.keys.User
        self.name = name
        self.grants: dict[ResourceRef, Any] = {}
        self.access: Any = None  # projects.access.Access, for the message that is being handled
        self.access_epoch = realtime.access_monitor.epoch  # at the time when ``access`` was read
        self.close_code: int | None = None
        self.busy = False  # a message is being handled
        self.last_received_at = self.last_ping_at = now
        self.expiry_warned = False  # whether ``token:expiring`` was sent for the current token
        self.throttle = Throttle(rate=settings.ws_frames_per_second, burst=settings.ws_burst, now=now)
        self._request = request
        self._transport = request.transport
        self._outbox: Outbox | None = None  # created when the peer first reads too slowly, which few do
        self._outbox_task: asyncio.Task[None] | None = None
        self._pending_close: tuple[int, str] | None = None
        self._after_reply: list[Callable[[], None]] = []
        self._peer_closed = asyncio.Event()

    @property
    def outbox_size(self) -> tuple[int, int]:
        """Return the number of frames and of bytes in the outbox."""
        return (len(self._outbox), self._outbox.bytes) if self._outbox else (0, 0)

    def is_in(self, workspace: UUID) -> bool:
        return ResourceRef("workspace", workspace) in self.grants

    def send(self, payload: bytes, delivery: Delivery = Delivery.DURABLE, key: Hashable = None) -> None:
        """Send one text frame."""
        self.write(websocket_frame(payload), delivery, key)

    def write(self, frame: bytes, delivery: Delivery = Delivery.DURABLE, key: Hashable = None) -> None:
        """Send a prebuilt frame; one of ``Delivery.COALESCED`` replaces a pending one with the same ``key``."""
        if self.close_code is not None or self._transport.is_closing():
            return  # uvloop raises when the transport has closed before its reader noticed
        self.realtime.frames_sent += 1
        if self._outbox_task is None and self._transport.get_write_buffer_size() < MAX_DIRECT_WRITE_BYTES:
            self._transport.write(frame)
        else:
            self._enqueue(frame, delivery, key)

    def after_reply(self, callback: Callable[[], None]) -> None:
        """Call back after the reply to the message that is being handled, before any other frame is sent."""
        self._after_reply.append(callback)

    def on_replied(self) -> None:
        """Run the ``after_reply`` callbacks: the reply has been sent, or there is none."""
        self.busy = False
        callbacks, self._after_reply = self._after_reply, []
        for callback in callbacks:
            callback()
        if self._pending_close is not None:
            self.close(*self._pending_close)

    def close(self, code: int, reason: str = "") -> None:
        """Leave every room now and start the close handshake; abort the transport if the peer does not read."""
        if self.close_code is None:
            self.close_code = code
            metrics.SOCKETS_CLOSED.labels(str(code)).inc()
            if code == CLOSE_OVERLOADED and self._outbox is not None:
                self._outbox.clear()
            self.realtime.unregister(self)
            self.realtime.spawn(self._close_handshake(code, reason))

    def close_after_reply(self, code: int, reason: str = "") -> None:
        """Close after the reply to the message that is being handled; now if there is none."""
        if self.busy:
            self._pending_close = (code, reason)
        else:
            self.close(code, reason)

    def revoke(self, resource: ResourceRef, revocation: Revocation) -> None:
        """Revoke the access to a resource: leave it and send ACCESS_REVOKED."""
        if resource not in self.grants:
            return
        del self.grants[resource]
        self.realtime.evict(self, resource)
        workspace = resource.id if resource.kind == "workspace" else None
        fields = {"reason": revocation.reason} | ({} if workspace else {"documentId": str(resource.id)})
        self.send(
            event_frame(
                event_body("ACCESS_REVOKED", workspace=workspace, user=revocation.actor, name=revocation.name, **fields)
            )
        )

    def send_drain_notice(self, frame: bytes) -> None:
        """Send ``server:draining``; a y-websocket connection overrides this, because its clients know no such frame."""
        self.write(frame)

    def on_peer_close(self, code: int | None) -> None:
        """Reply to the peer's close frame; ``code`` is None if the connection was lost without one."""
        if self._outbox is not None:
            self._outbox.clear()
        if code is not None and self.close_code is None and not self._transport.is_closing():
            self._transport.write(close_frame(close_reply(code)))
            self._transport.close()  # only after the peer has read everything, which it may never do
            asyncio.get_running_loop().call_later(CLOSE_HANDSHAKE_TIMEOUT_SECONDS, self._transport.abort)

    def on_closed(self) -> None:
        """Unregister the connection: nothing more will be read from the peer."""
        self._peer_closed.set()
        if self.close_code is None:
            self.close_code = CLOSE_ABNORMAL
            metrics.SOCKETS_CLOSED.labels(str(CLOSE_ABNORMAL)).inc()
            self.realtime.unregister(self)

    def _enqueue(self, frame: bytes, delivery: Delivery, key: Hashable) -> None:
        if self._outbox is None:
            settings = self.realtime.settings
            self._outbox = Outbox(max_frames=settings.ws_outbox_frames, max_bytes=settings.ws_outbox_bytes)
        if not self._outbox.put(frame, delivery, key):
            self.close(CLOSE_OVERLOADED, "client reads too slowly")
            return
        if self._outbox.dropped:
            metrics.FRAMES_DROPPED.labels("ephemeral").inc(self._outbox.dropped)
        if self._outbox_task is None:
            self._outbox_task = self.realtime.spawn(self._drain_outbox(self._outbox))

    async def _drain_outbox(self, outbox: Outbox) -> None:
        try:
            while outbox:
                await self._request.writer.drain()  # backpressure: waits while the peer does not read
                self._transport.writelines(outbox.take(MAX_DIRECT_WRITE_BYTES))
        except ConnectionError:
            outbox.clear()
        finally:
            self._outbox_task = None

    async def _close_handshake(self, code: int, reason: str) -> None:
        try:
            if self._outbox_task is not None:
                async with asyncio.timeout(CLOSE_HANDSHAKE_TIMEOUT_SECONDS):
                    await self._outbox_task
            if not self._transport.is_closing():
                self._transport.write(close_frame(code, reason))
            async with asyncio.timeout(CLOSE_HANDSHAKE_TIMEOUT_SECONDS):
                await self._peer_closed.wait()
        except TimeoutError:
            pass
        finally:
            self._transport.abort()
