"""Tickets: what opens a socket for clients that can set no header. Random, for 30 s, for one use.

Kept in Redis under their hash; what a ticket stands for is the user of the request that asked for it, whose
session the socket's door confirms as it does for a token.
"""

import hashlib
from datetime import UTC, datetime
from typing import Any
from uuid import UUID

from redis.asyncio import Redis

from server import json
from server.auth import tokens
from server.errors import Unauthenticated
from server.resources import reported
from server.rest.keys import User

TICKET_SECONDS = 30


async def issue(redis: Redis, *, user: User) -> str:
    """A new ticket.

    Raises:
        Unavailable: Redis is down.
    """
    ticket = tokens.new_secret()
    stands_for = [user.id, user.session, user.token, user.expires_at.isoformat()]
    with reported():
        await redis.set(_key(ticket), json.dumps(stands_for), ex=TICKET_SECONDS)
    return ticket


async def redeem(redis: Redis, *, ticket: str) -> User:
    """The user that a ticket stands for, once.

    Raises:
        Unauthenticated: it is unknown, used or too old, or the access token behind it has expired.
        Unavailable: Redis is down.
    """
    with reported():
        raw: Any = await redis.getdel(_key(ticket))
    if raw is None:
        raise Unauthenticated("The ticket is not valid; each is for one use, within 30 s")
    id, session, token, expires_at = json.loads(raw)
    user = User(id=UUID(id), session=UUID(session), token=token, expires_at=datetime.fromisoformat(expires_at))
    if user.expires_at <= datetime.now(UTC):
        raise Unauthenticated("The access token behind the ticket has expired")
    return user


def _key(ticket: str) -> str:
    return f"{{auth}}:ticket:{hashlib.sha256(ticket.encode('utf-8', 'replace')).hexdigest()}"
