"""GET /ws: authenticate, read frames, answer each that has an id with exactly one ack or error."""

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import structlog
from aiohttp import WSMsgType, web

from server import fields, metrics
from server.errors import ServiceError
from server.realtime import protocol
from server.realtime.connection import Connection
from server.realtime.hub import Authorize, Realtime
from server.realtime.protocol import MalformedFrame

log = structlog.get_logger()

HEARTBEAT_SECONDS = 25.0
REALTIME = web.AppKey("realtime", Realtime)
Authenticate = Callable[[web.Request], Awaitable[tuple[Any, str]]]
"""The user of the request and their name. Raises ServiceError before the upgrade."""


def websocket(
    authenticate: Authenticate, authorize: Authorize
) -> Callable[[web.Request], Awaitable[web.StreamResponse]]:
    """The route's handler, over who authenticates and who authorizes."""

    async def handler(request: web.Request) -> web.StreamResponse:
        realtime = request.app[REALTIME]
        user, name = await authenticate(request)
        socket = web.WebSocketResponse(
            protocols=[protocol.SUBPROTOCOL],
            heartbeat=HEARTBEAT_SECONDS,
            compress=False,
            max_msg_size=realtime.settings.ws_max_message_bytes,
        )
        await socket.prepare(request)
        assert request.transport is not None
        connection = Connection(socket, request.transport, realtime, user=user, name=name)
        realtime.connections[connection.id] = connection
        try:
            connection.send(_welcome(connection))
            await _read(connection, socket, authorize)
        finally:
            # Shielded: a cancelled handler must not leave a ghost in a room.
            await asyncio.shield(realtime.own(realtime.forget(connection)))
        return socket

    return handler


def _welcome(connection: Connection) -> bytes:
    return protocol.encode(
        "welcome",
        {
            "connectionId": connection.id,
            "userId": connection.user.id,
            "userName": connection.name,
            "heartbeatSeconds": HEARTBEAT_SECONDS,
            "maxMessageBytes": connection.realtime.settings.ws_max_message_bytes,
            "tokenExpiresAt": connection.user.expires_at,
        },
    )


async def _read(connection: Connection, socket: web.WebSocketResponse, authorize: Authorize) -> None:
    async for message in socket:
        metrics.FRAMES_IN.inc()
        if message.type is WSMsgType.TEXT:
            await _answer(connection, message.data, authorize)
        elif message.type is WSMsgType.BINARY:
            connection.send(protocol.refusal(protocol.malformed("Frames are text")))


async def _answer(connection: Connection, raw: str, authorize: Authorize) -> None:
    id = None
    try:
        frame = protocol.parse(raw)
        id = frame.id
        answer = await _handle(connection, frame, authorize)
        if id is not None:
            connection.send(protocol.ack(id, answer or {}))
    except ServiceError as error:
        connection.send(protocol.refusal(error, id=error.id if isinstance(error, MalformedFrame) else id))
    except Exception:
        log.exception("message failed", connection=connection.id)
        connection.send(protocol.refusal(ServiceError("Something went wrong on our side"), id=id))


async def _handle(connection: Connection, frame: protocol.Frame, authorize: Authorize) -> dict[str, Any] | None:
    message = connection.realtime.messages.get(frame.event)
    if message is None:
        raise ServiceError(f"No such event: {frame.event}", code="unknown_event")
    data = fields.load(message.schema, frame.data)
    await authorize(connection, message, data)
    return await message.handler(connection, data)
