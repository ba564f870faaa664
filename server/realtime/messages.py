"""Messages that every client may send, without a workspace or document."""

from datetime import UTC, datetime
from typing import Any

from marshmallow import fields

from server.errors import Forbidden
from server.fields import Schema, Timestamp
from server.realtime.connection import Connection
from server.realtime.table import MessageTable

messages = MessageTable()


class Authenticate(Schema):
    token = fields.String(required=True, metadata={"description": "an access token"})


class Authenticated(Schema):
    token_expires_at = Timestamp(required=True)


class Ping(Schema):
    pass


class Pong(Schema):
    server_time = Timestamp(required=True)


@messages.on("authenticate", Authenticate, ack=Authenticated)
async def authenticate(socket: Connection, data: dict[str, Any]) -> dict[str, Any]:
    """Sign in with the first frame; on a live connection, renew its token before it expires."""
    realtime = socket.realtime
    access_epoch = realtime.access_monitor.epoch
    user, name = await realtime.socket_auth.authenticate_token(data["token"])
    if user.id != socket.user.id:
        raise Forbidden("Token belongs to another user; open another connection")
    socket.user, socket.name, socket.expiry_warned = user, name, False
    if access_epoch != realtime.access_monitor.epoch:
        realtime.access_monitor.mark_stale(socket)
    return {"tokenExpiresAt": user.expires_at}


@messages.on("ping", Ping, ack=Pong)
async def ping(_: Connection, __: dict[str, Any]) -> dict[str, Any]:
    """Check that the server replies; optional in addition to WebSocket pings."""
    return {"serverTime": datetime.now(UTC)}
