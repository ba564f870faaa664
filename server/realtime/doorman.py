"""Who decides about a socket: ``app.py`` hands in what ``auth`` and ``projects`` know, the door knows no feature."""

from collections.abc import Awaitable, Callable, Coroutine
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from server.realtime.standing import Recheck
from server.realtime.table import Message

if TYPE_CHECKING:
    from server.realtime.connection import Connection

Identified = tuple[Any, str]
"""rest.keys.User and the user's name."""
Authorize = Callable[["Connection", Message, dict[str, Any]], Coroutine[Any, Any, None]]


@dataclass(frozen=True)
class Doorman:
    bearer: Callable[[str | None], str | None]
    """The token of an Authorization header, None where there is no such header. Raises Unauthenticated."""
    by_token: Callable[[str], Awaitable[Identified]]
    """Who signed in with this access token. Raises Unauthenticated, Unavailable."""
    by_ticket: Callable[[str], Awaitable[Identified]]
    """The same for a ticket, which is used up."""
    authorize: Authorize
    """Sets ``connection.access``. Raises ServiceError where the message may not be handled."""
    recheck: Recheck
    """Which of these still live and have access."""
