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
    """The caller: the claims of a verified access token of an active session."""

    id: UUID
    session: UUID
    token_id: str  # the id of the token (jti), not the token
    expires_at: datetime


RESOURCES = web.AppKey("resources", Resources)
LIMITER = web.AppKey("limiter", RateLimiter)

REQUEST_ID = web.RequestKey("request_id", str)
CLIENT_ADDRESS = web.RequestKey("client_address", str)  # see server/rest/forwarded.py
USER = web.RequestKey("user", User)
# Set if the rest of the body is not read: the connection is closed after the response.
CLOSE_AFTER_RESPONSE = web.RequestKey("close_after_response", bool)
# The parser's error. Method, path and headers of such a request are unknown.
MALFORMED_REQUEST = web.RequestKey("malformed_request", ServiceError)
RATE_LIMIT_COUNTED = web.RequestKey("rate_limit_counted", bool)  # the handler has counted the request in a rate limit
# Set once the head of the response is prepared: no other response can be sent then.
PREPARED_RESPONSE = web.RequestKey("prepared_response", web.StreamResponse)
RequestValues = dict[str, Any]
CommitHook = Callable[[], Awaitable[None]]
BODY: web.RequestKey[RequestValues] = web.RequestKey("body", dict)
QUERY: web.RequestKey[RequestValues] = web.RequestKey("query", dict)
DB: web.RequestKey[Executor] = web.RequestKey("db", Executor)
ON_COMMIT: web.RequestKey[list[CommitHook]] = web.RequestKey("on_commit", list)  # run after the commit of what DB wrote
# Added to the response, even if it is an error, a file or a socket.
RESPONSE_HEADERS: web.RequestKey[dict[str, str]] = web.RequestKey("response_headers", dict)
