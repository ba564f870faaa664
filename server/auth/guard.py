"""Who asks: from an access token to a signed-in user.

In two steps, so that the second can be asked together with what else a request needs of the stores.
"""

from datetime import UTC, datetime

from server.auth import store
from server.auth.sessions import Issuer
from server.errors import Unauthenticated
from server.postgres import Database
from server.rest.keys import User


def identify(issuer: Issuer, token: str) -> User:
    """The user that a valid token names; whether its session still lives is for ``confirm``.

    Raises:
        Unauthenticated: the token is not valid.
    """
    claims = issuer.verifier.verify(token, now=datetime.now(UTC))
    return User(id=claims.user, session=claims.session, token=claims.token, expires_at=claims.expires_at)


async def confirm(db: Database, issuer: Issuer, user: User) -> None:
    """Returns where the session lives.

    Raises:
        Unauthenticated: it has ended.
        Unavailable: neither Redis nor PostgreSQL can tell.
    """
    ended = await issuer.blacklist.ended(session=user.session, token=user.token)
    if ended is None:
        ended = await store.name_of_session(db, session=user.session, user=user.id) is None
    if ended:
        raise Unauthenticated("The session has ended")


async def confirm_with_name(db: Database, user: User) -> str:
    """The user's name, for a socket, whose session lives as its row says.

    Raises:
        Unauthenticated: it has ended.
    """
    name = await store.name_of_session(db, session=user.session, user=user.id)
    if name is None:
        raise Unauthenticated("The session has ended")
    return name


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
