"""GET /ws: authenticate, read frames, answer each that has an id with exactly one ack or error."""

import asyncio
from typing import Any
from urllib.parse import urlsplit

import structlog
from aiohttp import WSMessage, WSMsgType, hdrs, web

from server import fields, metrics
from server.errors import Forbidden, RateLimited, ServiceError, Unauthenticated, Unavailable
from server.realtime import hub, messages, protocol
from server.realtime.connection import Connection
from server.realtime.doorman import Doorman, Identified
from server.realtime.hub import REALTIME, RESTARTING, Realtime
from server.realtime.outbox import Delivery
from server.realtime.protocol import SUBPROTOCOL, Frame, MalformedFrame

log = structlog.get_logger()

FIRST_FRAME_SECONDS = 10.0
FRAMES_AT_ONCE = 16  # of one client, then others have their turn
MOST_PINGS = 16  # before the first frame; more, and who sends them is turned away
MOST_UNREAD = 256  # frames of one who is turned away, until theirs that closes
REFUSAL_PAUSE_SECONDS = 0.01  # after a refused frame: who floods is read more slowly
CLOSE_SECONDS = 2.0
BEARER_PROTOCOL = "bearer."
_AUTHENTICATE = messages.Authenticate()
_GONE = {WSMsgType.CLOSE, WSMsgType.CLOSING, WSMsgType.CLOSED, WSMsgType.ERROR}
_HEARTBEATS = {WSMsgType.PING, WSMsgType.PONG}


async def websocket(request: web.Request) -> web.StreamResponse:
    realtime = request.app[REALTIME]
    refuse_strangers(request, realtime)
    notices = realtime.standing.notices
    identified = await identify(request, realtime.doorman)
    socket = web.WebSocketResponse(
        protocols=[SUBPROTOCOL],
        autoping=False,
        autoclose=False,
        compress=False,
        max_msg_size=realtime.settings.ws_max_message_bytes,
    )
    await socket.prepare(request)
    try:
        greeting = None
        if identified is None:
            identified, greeting = await _first_frame(socket, realtime)
            notices = realtime.standing.notices - 1  # the frame came at some time since: looked up once more
        await _serve(request, socket, identified, greeting, notices=notices)
    except _TurnedAway as away:
        await _turn_away(request, socket, away)
    except Exception:  # rendered by the other door, it would be HTTP among the frames
        log.exception("socket failed")
        await _turn_away(request, socket, _TurnedAway(1011, "something went wrong on our side"))
    return socket


def refuse_strangers(request: web.Request, realtime: Realtime) -> None:
    """What every socket door asks before it opens.

    Raises:
        Unavailable: the process is about to stop.
        Forbidden: a page of a foreign origin asks.
    """
    if realtime.draining:
        raise Unavailable("This server is restarting")
    origin = request.headers.get(hdrs.ORIGIN)
    allowed = realtime.settings.cors_origin
    if origin is None or "*" in allowed or origin in allowed:
        return
    if urlsplit(origin).netloc.lower() != request.host.lower():
        raise Forbidden("Pages of this origin may not connect")


async def identify(request: web.Request, doorman: Doorman) -> Identified | None:
    """Who the handshake says it is; None where the first frame will.

    Raises:
        Unauthenticated: it says so badly.
    """
    if token := doorman.bearer(request.headers.get(hdrs.AUTHORIZATION)):
        return await doorman.by_token(token)
    if (token := _subprotocol_token(request)) is not None:
        return await doorman.by_token(token)
    if (ticket := request.query.get("ticket")) is not None:
        return await doorman.by_ticket(ticket)
    if request.query.keys() & {"token", "access_token", "accessToken"}:
        raise Unauthenticated("Never a token in the address: it ends in logs. See POST /api/v1/auth/ws-ticket")
    return None


def _subprotocol_token(request: web.Request) -> str | None:
    """The token in ``Sec-WebSocket-Protocol: collab.v1, bearer.<token>``.

    Raises:
        Unauthenticated: it stands there alone; a server may only select what is no secret.
    """
    offered = [each.strip() for each in ",".join(request.headers.getall(hdrs.SEC_WEBSOCKET_PROTOCOL, ())).split(",")]
    tokens = (each.removeprefix(BEARER_PROTOCOL) for each in offered if each.startswith(BEARER_PROTOCOL))
    token = next(tokens, None)
    if token is not None and SUBPROTOCOL not in offered:
        raise Unauthenticated(f"Offer the subprotocol {SUBPROTOCOL} beside the token")
    return token


class _TurnedAway(Exception):
    def __init__(self, code: int, reason: str, frame: bytes = b"") -> None:
        self.code, self.reason, self.frame = code, reason, frame


async def _first_frame(socket: web.WebSocketResponse, realtime: Realtime) -> tuple[Identified, Frame]:
    """Who the first frame says it is, and that frame.

    Raises:
        _TurnedAway: it does not, or not in time.
    """
    message = await _first_message(socket, realtime)
    if message.type in _GONE:
        raise _TurnedAway(1000, "")
    id = None
    try:
        frame = _parse(message)
        id = frame.id
        if frame.event != "authenticate":
            raise Unauthenticated("The first frame must be: authenticate")
        data = fields.load(_AUTHENTICATE, frame.data)
        return await realtime.doorman.by_token(data["token"]), frame
    except ServiceError as error:
        id = error.id if isinstance(error, MalformedFrame) else id
        code = 1013 if isinstance(error, Unavailable) else 4401
        raise _TurnedAway(code, error.detail, protocol.websocket_frame(protocol.refusal(error, id=id))) from None


async def _first_message(socket: web.WebSocketResponse, realtime: Realtime) -> WSMessage:
    patience = asyncio.timeout(0 if realtime.draining else FIRST_FRAME_SECONDS)
    realtime.strangers.add(patience)
    try:
        async with patience:
            for _ in range(MOST_PINGS):
                message = await socket.receive()
                if message.type not in _HEARTBEATS:
                    return message
    except TimeoutError:
        if realtime.draining:
            raise _TurnedAway(*RESTARTING) from None
        raise _TurnedAway(4408, "no authentication in time") from None
    finally:
        realtime.strangers.discard(patience)
    raise _TurnedAway(4400, "authenticate first")


async def _turn_away(request: web.Request, socket: web.WebSocketResponse, away: _TurnedAway) -> None:
    transport = request.transport
    if transport is None or transport.is_closing():
        return
    metrics.SOCKETS_CLOSED.labels(str(away.code)).inc()
    transport.write(away.frame + protocol.close_frame(away.code, away.reason))
    try:
        async with asyncio.timeout(CLOSE_SECONDS):
            await _until_closed(socket)
    except TimeoutError:
        pass
    transport.abort()


async def _until_closed(socket: web.WebSocketResponse) -> None:
    for turn in range(MOST_UNREAD):
        if (await socket.receive()).type in _GONE:
            return
        if turn % FRAMES_AT_ONCE == 0:
            await asyncio.sleep(0)


async def _serve(
    request: web.Request, socket: web.WebSocketResponse, identified: Identified, greeting: Frame | None, *, notices: int
) -> None:
    realtime, (user, name) = request.app[REALTIME], identified
    if request.transport is None:
        return
    now = asyncio.get_running_loop().time()
    connection = Connection(request, realtime, user=user, name=name, now=now)
    try:
        await realtime.listen_for(connection)
        realtime.admit(connection, notices=notices)
        connection.send(_welcome(connection))
        if greeting is not None and greeting.id is not None:
            connection.send(protocol.ack(greeting.id, {"tokenExpiresAt": user.expires_at}))
        if realtime.draining:
            connection.close(*RESTARTING)
        await _read(connection, socket)
    finally:
        connection.ended()


def _welcome(connection: Connection) -> bytes:
    return protocol.encode(
        "welcome",
        {
            "connectionId": connection.id,
            "userId": connection.user.id,
            "userName": connection.name,
            "heartbeatSeconds": hub.HEARTBEAT_SECONDS,
            "maxMessageBytes": connection.realtime.settings.ws_max_message_bytes,
            "tokenExpiresAt": connection.user.expires_at,
        },
    )


async def _read(connection: Connection, socket: web.WebSocketResponse) -> None:
    loop = asyncio.get_running_loop()
    turn = 0
    while True:
        message = await socket.receive()
        if message.type in _GONE:
            connection.closed_by_peer(message.data if message.type is WSMsgType.CLOSE else None)
            return
        turn += 1
        if turn % FRAMES_AT_ONCE == 0:
            await asyncio.sleep(0)
        if connection.close_code is not None:
            continue  # what comes between our close frame and theirs
        connection.heard_at = now = loop.time()
        metrics.FRAMES_IN.inc()
        admitted = connection.throttle.admit(now)
        if message.type is WSMsgType.PING:
            if admitted:
                connection.write(protocol.pong_frame(message.data), Delivery.DROPPABLE)
        elif message.type is not WSMsgType.PONG:
            await _answer(connection, message, admitted=admitted)
        if connection.throttle.exhausted(now):
            connection.close(4400, "over the limit, or malformed, for too long")
        elif not admitted:
            await asyncio.sleep(REFUSAL_PAUSE_SECONDS)


async def _answer(connection: Connection, message: WSMessage, *, admitted: bool) -> None:
    connection.busy = True
    id = None
    try:
        frame = _parse(message)
        id = frame.id
        if not admitted:
            raise RateLimited("Too many frames", retry_after=1)
        answer = await _handle(connection, frame)
        if id is not None:
            connection.send(protocol.ack(id, answer or {}))
    except MalformedFrame as error:
        connection.throttle.note_malformed(connection.heard_at)
        connection.send(protocol.refusal(error, id=error.id))
    except ServiceError as error:
        connection.send(protocol.refusal(error, id=id))
    except Exception:
        log.exception("message failed", connection=connection.id)
        connection.send(protocol.refusal(ServiceError("Something went wrong on our side"), id=id))
    finally:
        connection.answered()


def _parse(message: WSMessage) -> Frame:
    if message.type is not WSMsgType.TEXT:
        raise protocol.malformed("Frames are text")
    return protocol.parse(message.data)


async def _handle(connection: Connection, frame: Frame) -> dict[str, Any] | None:
    message = connection.realtime.messages.get(frame.event)
    if message is None:
        raise ServiceError(f"No such event: {frame.event}", code="unknown_event")
    data = fields.load(message.schema, frame.data)
    connection.notices = connection.realtime.standing.notices
    await connection.realtime.doorman.authorize(connection, message, data)
    return await message.handler(connection, data)
