"""Who asks: from an access token to a signed-in user."""

from server.auth import store, tokens
from server.auth.sessions import Issuer
from server.errors import Unauthenticated
from server.postgres import Executor
from server.rest.keys import User


async def authenticate(db: Executor, issuer: Issuer, token: str) -> User:
    """The user of a valid token whose session lives.

    Raises:
        Unauthenticated: the token is not valid, or its session has ended.
        Unavailable: neither Redis nor PostgreSQL can tell.
    """
    claims = tokens.verify(token, keys=issuer.access_keys)
    ended = await issuer.blacklist.ended(session=claims.session, token=claims.token)
    if ended is None:
        ended = not await store.session_alive(db, session=claims.session, user=claims.user)
    if ended:
        raise Unauthenticated("The session has ended")
    return User(id=claims.user, session=claims.session, token=claims.token, expires_at=claims.expires_at)


def bearer(header: str | None) -> str | None:
    """The token of an Authorization header (RFC 6750); None where there is no such header.

    Raises:
        Unauthenticated: it holds something else.
    """
    if header is None:
        return None
    scheme, _, token = header.partition(" ")
    if scheme.lower() != "bearer" or not token.strip():
        raise Unauthenticated("The Authorization header must be: Bearer <access token>")
    return token.strip()
