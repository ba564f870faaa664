"""Authentication and authorization of sockets.

``app.py`` passes in functions of ``auth`` and ``projects``, because this package imports no feature.
"""

from collections.abc import Awaitable, Callable, Coroutine
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from server.realtime.access_monitor import RecheckAccess
from server.realtime.table import MessageDef

if TYPE_CHECKING:
    from server.realtime.connection import Connection

AuthenticatedUser = tuple[Any, str]
"""A ``rest.keys.User`` and the user's name."""
Authorize = Callable[["Connection", MessageDef, dict[str, Any]], Coroutine[Any, Any, None]]


@dataclass(frozen=True)
class SocketAuth:
    bearer_token: Callable[[str | None], str | None]
    """Return the token of an Authorization header, or None without one. Raises Unauthenticated."""
    authenticate_token: Callable[[str], Awaitable[AuthenticatedUser]]
    """Return the user of an access token. Raises Unauthenticated, Unavailable."""
    authenticate_ticket: Callable[[str], Awaitable[AuthenticatedUser]]
    """Return the user of a ticket and use the ticket up. Raises Unauthenticated, Unavailable."""
    authorize: Authorize
    """Set ``connection.access``. Raises ServiceError if the message may not be handled."""
    recheck: RecheckAccess
    """Return the sessions that are still active and the accesses that still hold."""
