"""Typed keys of the application and of a request."""

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from datetime import datetime
from typing import Any
from uuid import UUID

from aiohttp import web

from server.errors import ServiceError
from server.postgres import Executor
from server.ratelimit import RateLimiter
from server.resources import Resources


@dataclass(frozen=True)
class User:
    """Who asks: the claims of a verified access token of a living session."""

    id: UUID
    session: UUID
    token: str  # the token's own id (jti), not the token
    expires_at: datetime


RESOURCES = web.AppKey("resources", Resources)
LIMITER = web.AppKey("limiter", RateLimiter)

REQUEST_ID = web.RequestKey("request_id", str)
CLIENT = web.RequestKey("client", str)  # address, behind trusted proxies the forwarded one
USER = web.RequestKey("user", User)
BROKEN_OFF = web.RequestKey("broken_off", bool)  # the rest of the body is of no interest: close after the answer
MALFORMED_REQUEST = web.RequestKey("malformed_request", ServiceError)  # nothing else is known of the request
COUNTED = web.RequestKey("counted", bool)  # its handler took it from a budget
BEGUN = web.RequestKey("begun", web.StreamResponse)  # its answer, once the head of it is on its way
Values = dict[str, Any]
Tell = Callable[[], Awaitable[None]]
BODY: web.RequestKey[Values] = web.RequestKey("body", dict)
QUERY: web.RequestKey[Values] = web.RequestKey("query", dict)
DB: web.RequestKey[Executor] = web.RequestKey("db", Executor)
ON_COMMIT: web.RequestKey[list[Tell]] = web.RequestKey("on_commit", list)  # of what was written by way of DB
HEADERS: web.RequestKey[dict[str, str]] = web.RequestKey("headers", dict)  # to be sent with the answer, whatever it is
