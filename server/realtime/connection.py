"""One socket: who it is, what it joined, and its bounded outbox with one writer."""

import asyncio
from collections import deque
from typing import TYPE_CHECKING, Any
from uuid import UUID, uuid4

from aiohttp import WSMsgType, web

from server import metrics
from server.realtime.protocol import websocket_frame

if TYPE_CHECKING:
    from server.realtime.hub import Realtime

DIRECT_BYTES = 64 << 10  # a transport with less than this to send is written to at once
CLOSE_SECONDS = 2.0


class Connection:
    """Frames are written straight to the transport while the peer keeps up; when it does not, they wait in
    the outbox, which one task empties and then ends. At the outbox's bound the connection ends."""

    def __init__(
        self, socket: web.WebSocketResponse, transport: asyncio.Transport, realtime: "Realtime", *, user: Any, name: str
    ) -> None:
        self.id = uuid4().hex
        self.realtime = realtime
        self.user = user  # rest.keys.User
        self.name = name
        self.rooms: set[UUID] = set()
        self.access: Any = None  # projects.access.Access, for the message that is being handled
        self.close_code: int | None = None
        self._socket = socket
        self._transport = transport
        self._outbox: deque[bytes] = deque()
        self._outbox_bytes = 0
        self._writer: asyncio.Task[None] | None = None

    def send(self, payload: bytes, frame: bytes | None = None) -> None:
        """Send one text frame; ``frame`` is the same, prebuilt, where many get it."""
        if self.close_code is not None or self._transport.is_closing():
            return
        metrics.FRAMES_OUT.inc()
        if self._writer is None and self._transport.get_write_buffer_size() < DIRECT_BYTES:
            self._transport.write(frame or websocket_frame(payload))
        else:
            self._queue(payload)

    def close(self, code: int, reason: str = "") -> None:
        """End the connection: soon, and aborted when the peer does not read."""
        if self.close_code is None:
            self.close_code = code
            metrics.SOCKETS_CLOSED.labels(str(code)).inc()
            self._outbox.clear()
            if self._writer is not None:
                self._writer.cancel()
            self.realtime.own(self._end(code, reason))

    async def _end(self, code: int, reason: str) -> None:
        try:
            async with asyncio.timeout(CLOSE_SECONDS):
                await self._socket.close(code=code, message=reason.encode())
        except (TimeoutError, ConnectionError):
            pass
        finally:
            self._transport.abort()

    def _queue(self, payload: bytes) -> None:
        settings = self.realtime.settings
        if (
            len(self._outbox) >= settings.ws_outbox_frames
            or self._outbox_bytes + len(payload) > settings.ws_outbox_bytes
        ):
            self.close(1013, "too slow")
            return
        self._outbox.append(payload)
        self._outbox_bytes += len(payload)
        if self._writer is None:
            self._writer = self.realtime.own(self._empty_outbox())

    async def _empty_outbox(self) -> None:
        try:
            while self._outbox:
                payload = self._outbox[0]
                await self._socket.send_frame(payload, WSMsgType.TEXT)  # waits while the peer does not read
                self._outbox.popleft()
                self._outbox_bytes -= len(payload)
        except ConnectionError:
            self._outbox.clear()
        finally:
            self._writer = None
