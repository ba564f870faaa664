"""Tickets: they open a socket for clients that cannot set a header. Random, valid for 30 s and for one use.

Redis stores them under their hash. A ticket represents the user of the request that issued it; the socket endpoint
checks the user's session as it does for a token.
"""

import hashlib
from datetime import UTC, datetime
from typing import Any
from uuid import UUID

from redis.asyncio import Redis

from server import json
from server.auth import tokens
from server.errors import Unauthenticated
from server.resources import translate_store_errors
from server.rest.keys import User

TICKET_TTL_SECONDS = 30


async def issue(redis: Redis, *, user: User) -> str:
    """Issue a ticket.

    Raises:
        Unavailable: Redis is down.
    """
    ticket = tokens.new_secret()
    claims = [user.id, user.session, user.token_id, user.expires_at.isoformat()]
    with translate_store_errors():
        await redis.set(_key(ticket), json.dumps(claims), ex=TICKET_TTL_SECONDS)
    return ticket


async def redeem(redis: Redis, *, ticket: str) -> User:
    """Use up a ticket and return its user.

    Raises:
        Unauthenticated: the ticket is unknown, used or expired, or the access token behind it has expired.
        Unavailable: Redis is down.
    """
    with translate_store_errors():
        raw: Any = await redis.getdel(_key(ticket))
    if raw is None:
        raise Unauthenticated(f"The ticket is not valid: a ticket is for one use within {TICKET_TTL_SECONDS} seconds")
    id, session, token_id, expires_at = json.loads(raw)
    user = User(id=UUID(id), session=UUID(session), token_id=token_id, expires_at=datetime.fromisoformat(expires_at))
    if user.expires_at <= datetime.now(UTC):
        raise Unauthenticated("The access token behind the ticket has expired")
    return user


def _key(ticket: str) -> str:
    return f"{{auth}}:ticket:{hashlib.sha256(ticket.encode('utf-8', 'replace')).hexdigest()}"
