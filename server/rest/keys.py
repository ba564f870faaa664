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
CLIENT_ADDRESS = web.RequestKey("client_address", str)  # the client's address, behind trusted proxies the forwarded one
USER = web.RequestKey("user", User)
CLOSE_AFTER_RESPONSE = web.RequestKey(
    "close_after_response", bool
)  # the rest of the body is not read: close after the response
MALFORMED_REQUEST = web.RequestKey("malformed_request", ServiceError)  # the parser's error; all else is unknown
RATE_LIMIT_COUNTED = web.RequestKey("rate_limit_counted", bool)  # the handler has counted the request in a rate limit
PREPARED_RESPONSE = web.RequestKey(
    "prepared_response", web.StreamResponse
)  # the response, from the moment its head is prepared
RequestValues = dict[str, Any]
CommitHook = Callable[[], Awaitable[None]]
BODY: web.RequestKey[RequestValues] = web.RequestKey("body", dict)
QUERY: web.RequestKey[RequestValues] = web.RequestKey("query", dict)
DB: web.RequestKey[Executor] = web.RequestKey("db", Executor)
ON_COMMIT: web.RequestKey[list[CommitHook]] = web.RequestKey("on_commit", list)  # run after the commit of what DB wrote
RESPONSE_HEADERS: web.RequestKey[dict[str, str]] = web.RequestKey(
    "response_headers", dict
)  # sent with the response, of any kind
