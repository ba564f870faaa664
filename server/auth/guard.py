"""Authentication of a caller: from an access token to a signed-in user.

It has two steps, so that the second can run concurrently with the other store lookups of a request.
"""

from datetime import UTC, datetime

from server.auth import store
from server.auth.sessions import AuthContext
from server.errors import Unauthenticated
from server.postgres import Database
from server.rest.keys import User


def authenticate_token(auth_context: AuthContext, token: str) -> User:
    """Return the user of a valid token; ``check_session`` checks that its session is active.

    Raises:
        Unauthenticated: the token is not valid.
    """
    claims = auth_context.verifier.verify(token, now=datetime.now(UTC))
    return User(id=claims.user, session=claims.session, token_id=claims.token_id, expires_at=claims.expires_at)


async def check_session(db: Database, auth_context: AuthContext, user: User) -> None:
    """Check that the user's session is active.

    Raises:
        Unauthenticated: the session has ended.
        Unavailable: neither Redis nor PostgreSQL responds.
    """
    ended = await auth_context.blacklist.is_revoked(session=user.session, token_id=user.token_id)
    if ended is None:
        ended = await store.user_name_of_session(db, session=user.session, user=user.id) is None
    if ended:
        raise Unauthenticated("The session has ended")


async def check_session_and_read_name(db: Database, user: User) -> str:
    """Return the user's name, for a socket, after checking the session in PostgreSQL.

    Raises:
        Unauthenticated: the session has ended.
    """
    name = await store.user_name_of_session(db, session=user.session, user=user.id)
    if name is None:
        raise Unauthenticated("The session has ended")
    return name


def parse_bearer(header: str | None) -> str | None:
    """Return the token of an Authorization header (RFC 6750), or None without the header.

    Raises:
        Unauthenticated: the header has another scheme, or no token.
    """
    if header is None:
        return None
    scheme, _, token = header.partition(" ")
    if scheme.lower() != "bearer" or not token.strip():
        raise Unauthenticated("The Authorization header must be: Bearer <access token>")
    return token.strip()
