"""GET /ws: authenticate, read frames, and reply to each frame with an id by exactly one ack or error."""

import asyncio
from typing import Any
from urllib.parse import urlsplit

import structlog
from aiohttp import WSMessage, WSMsgType, hdrs, web

from server import fields, metrics
from server.errors import Forbidden, RateLimited, ServiceError, Unauthenticated, Unavailable
from server.realtime import hub, messages, protocol
from server.realtime.connection import Connection
from server.realtime.hub import CLOSE_RESTARTING, REALTIME, Realtime
from server.realtime.outbox import Delivery
from server.realtime.protocol import SUBPROTOCOL, Frame, MalformedFrame
from server.realtime.socket_auth import AuthenticatedUser, SocketAuth

log = structlog.get_logger()

AUTHENTICATE_TIMEOUT_SECONDS = 10.0
MAX_FRAMES_PER_TURN = 16  # of one client before it yields to the others
MAX_PINGS_BEFORE_AUTH = 16  # a client that sends this many before its first frame is rejected
MAX_DISCARDED_FRAMES = 256  # frames of a rejected client to discard until its close frame
REJECTION_DELAY_SECONDS = 0.01  # after a rejected frame: backpressure on a client that floods
REJECTION_CLOSE_TIMEOUT_SECONDS = 2.0
BEARER_PROTOCOL = "bearer."
_AUTHENTICATE = messages.Authenticate()
_CLOSE_TYPES = {WSMsgType.CLOSE, WSMsgType.CLOSING, WSMsgType.CLOSED, WSMsgType.ERROR}
_PING_PONG = {WSMsgType.PING, WSMsgType.PONG}


async def websocket(request: web.Request) -> web.StreamResponse:
    realtime = request.app[REALTIME]
    check_upgrade(request, realtime)
    access_epoch = realtime.access_monitor.epoch
    identified = await authenticate_upgrade(request, realtime.socket_auth)
    socket = web.WebSocketResponse(
        protocols=[SUBPROTOCOL],
        autoping=False,
        autoclose=False,
        compress=False,
        max_msg_size=realtime.settings.ws_max_message_bytes,
    )
    await socket.prepare(request)
    try:
        first_frame = None
        if identified is None:
            identified, first_frame = await _authenticate_first_frame(socket, realtime)
            access_epoch = realtime.access_monitor.epoch - 1  # an older one, so that registering schedules a recheck
        await _serve(request, socket, identified, first_frame, access_epoch=access_epoch)
    except _Rejected as rejected:
        await _reject(request, socket, rejected)
    except Exception:  # else the REST transport would write an HTTP response between the frames
        log.exception("socket failed")
        await _reject(request, socket, _Rejected(1011, "internal server error"))
    return socket


def check_upgrade(request: web.Request, realtime: Realtime) -> None:
    """Check before the upgrade that the process accepts sockets, and those of the page's origin.

    Raises:
        Unavailable: the process drains for a graceful shutdown.
        Forbidden: the page's origin is not allowed.
    """
    if realtime.draining:
        raise Unavailable("Server is restarting")
    origin = request.headers.get(hdrs.ORIGIN)
    allowed = realtime.settings.cors_origin
    if origin is None or "*" in allowed or origin in allowed:
        return
    if urlsplit(origin).netloc.lower() != request.host.lower():
        raise Forbidden("Origin not allowed")


async def authenticate_upgrade(request: web.Request, socket_auth: SocketAuth) -> AuthenticatedUser | None:
    """Return the user of the upgrade request's token or ticket; None if the first frame has to authenticate.

    Raises:
        Unauthenticated: the token or the ticket is not valid, or is sent in the wrong place.
    """
    if token := socket_auth.bearer_token(request.headers.get(hdrs.AUTHORIZATION)):
        return await socket_auth.authenticate_token(token)
    if (token := _subprotocol_token(request)) is not None:
        return await socket_auth.authenticate_token(token)
    if (ticket := request.query.get("ticket")) is not None:
        return await socket_auth.authenticate_ticket(ticket)
    if request.query.keys() & {"token", "access_token", "accessToken"}:
        # URLs end up in logs.
        raise Unauthenticated("Access tokens are not allowed in the URL; use a ticket of POST /api/v1/auth/ws-ticket")
    return None


def _subprotocol_token(request: web.Request) -> str | None:
    """Return the token in ``Sec-WebSocket-Protocol: collab.v1, bearer.<token>``, or None.

    Raises:
        Unauthenticated: ``collab.v1`` is missing; the server must select a subprotocol, which must not be a secret.
    """
    header = ",".join(request.headers.getall(hdrs.SEC_WEBSOCKET_PROTOCOL, ()))
    offered = [subprotocol.strip() for subprotocol in header.split(",")]
    tokens = (
        subprotocol.removeprefix(BEARER_PROTOCOL) for subprotocol in offered if subprotocol.startswith(BEARER_PROTOCOL)
    )
    token = next(tokens, None)
    if token is not None and SUBPROTOCOL not in offered:
        raise Unauthenticated(f"Subprotocol {SUBPROTOCOL} must be offered together with the token")
    return token


class _Rejected(Exception):
    def __init__(self, code: int, reason: str, frame: bytes = b"") -> None:
        self.code, self.reason, self.frame = code, reason, frame


async def _authenticate_first_frame(
    socket: web.WebSocketResponse, realtime: Realtime
) -> tuple[AuthenticatedUser, Frame]:
    """Return the user whom the first frame authenticates, and that frame.

    Raises:
        _Rejected: the frame does not authenticate, or did not come in time.
    """
    message = await _first_message(socket, realtime)
    if message.type in _CLOSE_TYPES:
        raise _Rejected(1000, "")
    id = None
    try:
        frame = _parse(message)
        id = frame.id
        if frame.event != "authenticate":
            raise Unauthenticated("First frame must be an authenticate event")
        data = fields.load(_AUTHENTICATE, frame.data)
        return await realtime.socket_auth.authenticate_token(data["token"]), frame
    except ServiceError as error:
        id = error.id if isinstance(error, MalformedFrame) else id
        code = 1013 if isinstance(error, Unavailable) else 4401
        raise _Rejected(code, error.detail, protocol.websocket_frame(protocol.error_reply(error, id=id))) from None


async def _first_message(socket: web.WebSocketResponse, realtime: Realtime) -> WSMessage:
    timeout = asyncio.timeout(0 if realtime.draining else AUTHENTICATE_TIMEOUT_SECONDS)
    realtime.unauthenticated.add(timeout)
    try:
        async with timeout:
            for _ in range(MAX_PINGS_BEFORE_AUTH):
                message = await socket.receive()
                if message.type not in _PING_PONG:
                    return message
    except TimeoutError:
        if realtime.draining:
            raise _Rejected(*CLOSE_RESTARTING) from None
        raise _Rejected(4408, "authentication timed out") from None
    finally:
        realtime.unauthenticated.discard(timeout)
    raise _Rejected(4400, "too many pings before authentication")


async def _reject(request: web.Request, socket: web.WebSocketResponse, rejected: _Rejected) -> None:
    transport = request.transport
    if transport is None or transport.is_closing():
        return
    metrics.SOCKETS_CLOSED.labels(str(rejected.code)).inc()
    transport.write(rejected.frame + protocol.close_frame(rejected.code, rejected.reason))
    try:
        async with asyncio.timeout(REJECTION_CLOSE_TIMEOUT_SECONDS):
            await _wait_closed(socket)
    except TimeoutError:
        pass
    transport.abort()


async def _wait_closed(socket: web.WebSocketResponse) -> None:
    for count in range(MAX_DISCARDED_FRAMES):
        if (await socket.receive()).type in _CLOSE_TYPES:
            return
        if count % MAX_FRAMES_PER_TURN == 0:
            await asyncio.sleep(0)


async def _serve(
    request: web.Request,
    socket: web.WebSocketResponse,
    identified: AuthenticatedUser,
    first_frame: Frame | None,
    *,
    access_epoch: int,
) -> None:
    realtime, (user, name) = request.app[REALTIME], identified
    if request.transport is None:  # the client has disconnected meanwhile
        return
    now = asyncio.get_running_loop().time()
    connection = Connection(request, realtime, user=user, name=name, now=now)
    try:
        await realtime.subscribe_user(connection)
        realtime.register(connection, access_epoch=access_epoch)
        connection.send(_welcome(connection))
        if first_frame is not None and first_frame.id is not None:
            connection.send(protocol.ack(first_frame.id, {"tokenExpiresAt": user.expires_at}))
        if realtime.draining:
            connection.close(*CLOSE_RESTARTING)
        await _read(connection, socket)
    finally:
        connection.on_closed()


def _welcome(connection: Connection) -> bytes:
    return protocol.encode(
        "welcome",
        {
            "connectionId": connection.id,
            "userId": connection.user.id,
            "userName": connection.name,
            "heartbeatSeconds": hub.HEARTBEAT_INTERVAL_SECONDS,
            "maxMessageBytes": connection.realtime.settings.ws_max_message_bytes,
            "tokenExpiresAt": connection.user.expires_at,
        },
    )


async def _read(connection: Connection, socket: web.WebSocketResponse) -> None:
    loop = asyncio.get_running_loop()
    received = 0
    while True:
        message = await socket.receive()
        if message.type in _CLOSE_TYPES:
            connection.on_peer_close(message.data if message.type is WSMsgType.CLOSE else None)
            return
        received += 1
        if received % MAX_FRAMES_PER_TURN == 0:
            await asyncio.sleep(0)
        if connection.close_code is not None:
            continue  # discard frames between the server's close frame and the client's
        connection.last_received_at = now = loop.time()
        metrics.FRAMES_IN.inc()
        allowed = connection.throttle.allow(now)
        if message.type is WSMsgType.PING:
            if allowed:
                connection.write(protocol.pong_frame(message.data), Delivery.DROPPABLE)
        elif message.type is not WSMsgType.PONG:
            await _handle_and_reply(connection, message, allowed=allowed)
        if connection.throttle.must_close(now):
            connection.close(4400, "too many frames, or too many malformed frames")
        elif not allowed:
            await asyncio.sleep(REJECTION_DELAY_SECONDS)


async def _handle_and_reply(connection: Connection, message: WSMessage, *, allowed: bool) -> None:
    connection.busy = True
    id = None
    try:
        frame = _parse(message)
        id = frame.id
        if not allowed:
            raise RateLimited("Too many frames", retry_after=1)
        data = await _handle(connection, frame)
        if id is not None:
            connection.send(protocol.ack(id, data or {}))
    except MalformedFrame as error:
        connection.throttle.record_malformed(connection.last_received_at)
        connection.send(protocol.error_reply(error, id=error.id))
    except ServiceError as error:
        connection.send(protocol.error_reply(error, id=id))
    except Exception:
        log.exception("message failed", connection=connection.id)
        connection.send(protocol.error_reply(ServiceError("Internal server error"), id=id))
    finally:
        connection.on_replied()


def _parse(message: WSMessage) -> Frame:
    if message.type is not WSMsgType.TEXT:
        raise protocol.malformed("Frame must be a text frame")
    return protocol.parse(message.data)


async def _handle(connection: Connection, frame: Frame) -> dict[str, Any] | None:
    message = connection.realtime.messages.get(frame.event)
    if message is None:
        raise ServiceError(f"Unknown event: {frame.event}", code="unknown_event")
    data = fields.load(message.schema, frame.data)
    connection.access_epoch = connection.realtime.access_monitor.epoch
    await connection.realtime.socket_auth.authorize(connection, message, data)
    return await message.handler(connection, data)
