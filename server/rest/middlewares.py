"""The middlewares of every request.

Their order: access log → trace span → render errors → deadline → admit → validate → authorize the payload →
idempotency key → handler.

Decorators mark the handlers, and the middlewares act on the marks. Access is denied by default: without ``@public`` a
route requires a signed-in user, and a route with the id of a resource in its path requires a declared role.
"""

import asyncio
import re
import time
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from dataclasses import dataclass
from functools import lru_cache
from random import getrandbits
from typing import Any

import structlog
from aiohttp import hdrs, web
from aiohttp.typedefs import Handler, Middleware
from multidict import istr
from prometheus_client import Histogram

from server import errors, fields, json, metrics, tracing
from server.deadline import paused, store_deadline
from server.errors import ServiceError, Unauthenticated
from server.ratelimit import LIMITED_BY_HANDLER, QuotaExceeded, RateLimiter, limit_key, limit_of
from server.rest import quotas
from server.rest.forwarded import ClientAddressResolver
from server.rest.idempotency import apply_idempotency
from server.rest.keys import (
    BODY,
    CLIENT_ADDRESS,
    CLOSE_AFTER_RESPONSE,
    MALFORMED_REQUEST,
    PREPARED_RESPONSE,
    QUERY,
    RATE_LIMIT_COUNTED,
    REQUEST_ID,
    RESPONSE_HEADERS,
    USER,
    User,
)
from server.rest.marks import is_public, produces_json
from server.settings import Network

log = structlog.get_logger()

BODY_TIMEOUT_SECONDS = 10.0
SWITCHING_PROTOCOLS = 101
STORE_DEADLINE_SECONDS = 1.6  # so that every response follows within 2 s of the body
_JSON_PREFIX = "/api/v1/"
_NO_PARAMETERS = fields.Schema()
_REQUEST_ID_PATTERN = re.compile(r"[A-Za-z0-9._:/+=-]{1,128}")
_DEFAULT_HEADERS = {
    istr(name): value
    for name, value in {
        "X-Content-Type-Options": "nosniff",
        "X-Frame-Options": "DENY",
        "Referrer-Policy": "no-referrer",
        "Cross-Origin-Resource-Policy": "cross-origin",
        "Content-Security-Policy": "default-src 'none'; frame-ancestors 'none'",
        "Cache-Control": "private, no-cache",
    }.items()
}


@dataclass(frozen=True)
class Admission:
    """The checks that the application passes in, because this package knows no feature."""

    authenticate: Callable[[web.Request], User | None]
    """Return the user of the request's token, without a store. Raises Unauthenticated."""
    check_session: Callable[[User], Coroutine[Any, Any, None]]
    """Check that the user's session is active. Raises Unauthenticated or Unavailable."""
    authorize_path: Callable[[web.Request], Coroutine[Any, Any, None] | None]
    """Check the role for the resource in the path; None without one. Raises NotFound, Forbidden, Unavailable."""
    authorize_payload: Callable[[web.Request], Awaitable[None]]
    """Check the role for the resources that body or query name."""
    limiter: RateLimiter
    trusted_proxies: Sequence[Network]


def middlewares(admission: Admission, *, traced: bool) -> list[Middleware]:
    outermost = [access_log(admission.trusted_proxies), *([with_span] if traced else [])]
    return [
        *outermost,
        render_errors,
        with_deadline,
        admit(admission),
        validate,
        authorize_payload(admission),
        apply_idempotency,
    ]


def access_log(trusted: Sequence[Network]) -> Middleware:
    """Return the middleware that sets request id and client address, and writes the log line and the metrics."""
    addresses = ClientAddressResolver(trusted)

    @web.middleware
    async def middleware(request: web.Request, handler: Handler) -> web.StreamResponse:
        started = time.perf_counter()
        assign_request_id(request)
        request[CLIENT_ADDRESS] = addresses.resolve(request)
        structlog.contextvars.clear_contextvars()
        structlog.contextvars.bind_contextvars(request_id=request[REQUEST_ID])
        response = await handler(request)
        _record_request(request, response.status, time.perf_counter() - started)
        return response

    return middleware


def assign_request_id(request: web.Request) -> None:
    """Give the request its id, and a dict for headers of its response."""
    request[REQUEST_ID] = _request_id(request)
    request[RESPONSE_HEADERS] = {}


@web.middleware
async def with_span(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Run an API request in an OpenTelemetry span; a socket gets none, because its span would last for hours."""
    if not request.path.startswith("/api/"):
        return await handler(request)
    with tracing.request_span(request.method, request.headers) as span:
        response = await handler(request)
        tracing.record_response(span, method=request.method, route=_route(request), status=response.status)
        return response


@web.middleware
async def render_errors(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Render every error as a problem body (RFC 9457); an unexpected one as a 500 without details."""
    try:
        if MALFORMED_REQUEST in request:
            raise request[MALFORMED_REQUEST]
        return await handler(request)
    except Exception as error:
        if PREPARED_RESPONSE in request:
            return abort_response(request, error)
        if isinstance(error, web.HTTPException) and error.status < 400:
            raise
        return problem_response(request, _to_service_error(request, error))


def abort_response(request: web.Request, error: Exception) -> web.StreamResponse:
    """Abort the connection after an error in a response that has begun: further bytes would count as its body."""
    if request.transport is not None:
        request.transport.abort()
    if not isinstance(error, ConnectionError):  # else the client has closed the connection
        log.error("response aborted", method=request.method, path=request.path, exc_info=error)
    return request[PREPARED_RESPONSE]


def _to_service_error(request: web.Request, error: Exception) -> ServiceError:
    if isinstance(error, ServiceError):
        return error
    if isinstance(error, web.HTTPException):
        return _from_http_exception(error)
    log.error("request failed", method=request.method, path=request.path, exc_info=error)
    return ServiceError("Internal server error")


@web.middleware
async def with_deadline(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Run an API request with a deadline for its stores; a socket has none, because it outlives every deadline."""
    if not request.path.startswith("/api/"):
        return await handler(request)
    with store_deadline(STORE_DEADLINE_SECONDS):
        return await handler(request)


def admit(admission: Admission) -> Middleware:
    """Return the middleware that checks session, rate limit and access concurrently."""

    @web.middleware
    async def middleware(request: web.Request, handler: Handler) -> web.StreamResponse:
        target = request.match_info.handler
        if request.match_info.http_exception is not None or request.method == hdrs.METH_OPTIONS:
            return await handler(request)
        authenticated = _authenticate(admission, request, public=is_public(target))
        user = authenticated if isinstance(authenticated, User) else None
        if user is not None:
            request[USER] = user
        name = limit_of(target)
        by_handler = name in LIMITED_BY_HANDLER
        key = limit_key(name, user=user and user.id, client=request[CLIENT_ADDRESS]) if name else ""
        session, quota, access = await _gather_outcomes(
            admission.check_session(user) if user else None,
            admission.limiter.hit(name, key)
            if name and not by_handler and admission.limiter.is_enabled(name)
            else None,
            admission.authorize_path(request) if user else None,
        )
        if isinstance(quota, BaseException):
            raise quota
        if quota is not None and isinstance(session, Unauthenticated):
            # A client with the token of an ended session is not that user, so the hit counts for its address instead.
            quota = await admission.limiter.move_hit(quota, key, limit_key(quota.name, client=request[CLIENT_ADDRESS]))
        if quota is not None:
            if not quota.allowed:
                raise QuotaExceeded(quota)
            request[RESPONSE_HEADERS].update(quota.headers())
        for outcome in (authenticated, session, access):
            if isinstance(outcome, BaseException):
                raise outcome
        return await (_count_rejected(request, handler) if by_handler else handler(request))

    return middleware


async def _count_rejected(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Let the handler count the request; if it rejects the request first, count that in the address's quota."""
    try:
        return await handler(request)
    except ServiceError as error:
        if error.status < 500 and RATE_LIMIT_COUNTED not in request:
            await quotas.consume_auth_for_address(request)
        raise


@web.middleware
async def validate(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Load body and query with the schemas that the handler declares, into typed request keys."""
    target = request.match_info.handler
    for declared in getattr(target, "__schemas__", ()):
        if declared["location"] == "json":
            request[BODY] = fields.load(declared["schema"], await _json_body(request))
        elif declared["location"] == "querystring":
            request[QUERY] = _query(declared["schema"], request)
    if (
        request.query_string
        and QUERY not in request
        and request.path.startswith(_JSON_PREFIX)
        and produces_json(target)
    ):
        _query(_NO_PARAMETERS, request)
    return await handler(request)


def authorize_payload(admission: Admission) -> Middleware:
    @web.middleware
    async def middleware(request: web.Request, handler: Handler) -> web.StreamResponse:
        if BODY in request or QUERY in request:
            await admission.authorize_payload(request)
        return await handler(request)

    return middleware


async def add_default_headers(request: web.Request, response: web.StreamResponse) -> None:
    """Add the headers of every response, as a signal: it also runs for files and sockets."""
    for name, value in _DEFAULT_HEADERS.items():
        response.headers.setdefault(name, value)
    response.headers["X-Request-Id"] = request[REQUEST_ID]
    response.headers.update(request[RESPONSE_HEADERS])
    request[PREPARED_RESPONSE] = response
    response.headers.popall(hdrs.SERVER, None)


def problem_response(request: web.Request, error: ServiceError) -> web.Response:
    headers: dict[str, str] = {}
    if error.status == 401:
        headers["WWW-Authenticate"] = 'Bearer error="invalid_token"'
    if error.retry_after is not None:
        headers["Retry-After"] = str(error.retry_after)
    if isinstance(error, QuotaExceeded):
        request[RESPONSE_HEADERS].update(error.quota.headers())
    if isinstance(error, errors.MethodNotAllowed):
        headers["Allow"] = ", ".join(error.allowed)
    body = json.dumps(errors.problem(error, request_id=request.get(REQUEST_ID, "")))
    response = web.Response(status=error.status, body=body, content_type="application/problem+json", headers=headers)
    if CLOSE_AFTER_RESPONSE in request:
        response.force_close()
    return response


def _request_id(request: web.Request) -> str:
    client_id = request.headers.get("X-Request-Id", "")
    # Unique is enough: guessing an id gains nothing.
    return client_id if client_id and _REQUEST_ID_PATTERN.fullmatch(client_id) else f"{getrandbits(128):032x}"


def _route(request: web.Request) -> str:
    """Return the path template of the request's route."""
    resource = request.match_info.route.resource
    return resource.canonical if resource else "unmatched"


@lru_cache(4096)
def _latency(method: str, route: str, status: int) -> Histogram:
    return metrics.REQUEST_DURATION.labels(method, route, str(status))


def _record_request(request: web.Request, status: int, seconds: float) -> None:
    if status != SWITCHING_PROTOCOLS:  # the lifetime of a socket is not a latency
        _latency(request.method, _route(request), status).observe(seconds)
    user = request.get(USER)
    log.info(
        "request",
        method=request.method,
        path=request.path,
        status=status,
        ms=round(seconds * 1000, 1),
        client=request[CLIENT_ADDRESS],
        user=str(user.id) if user else None,
    )


def _authenticate(admission: Admission, request: web.Request, *, public: bool) -> User | Unauthenticated | None:
    """Return the user, an error to raise after the rate limiter has counted the request, or None on a public route."""
    if public:
        return None
    try:
        user = admission.authenticate(request)
    except Unauthenticated as error:
        return error
    return user or Unauthenticated("Not signed in: send the header Authorization: Bearer <access token>")


async def _gather_outcomes(*checks: Coroutine[Any, Any, Any] | None) -> list[Any]:
    """Await all checks concurrently; return the result or exception of each, and None for a missing one.

    The first one runs without a task of its own, because a task costs as much as the check.
    """
    present = [check for check in checks if check is not None]
    tasks = [asyncio.ensure_future(check) for check in present[1:]]
    try:
        outcomes = iter([await _outcome(check) for check in (*present[:1], *tasks)])
    finally:
        for task in tasks:
            task.cancel()
    return [None if check is None else next(outcomes) for check in checks]


async def _outcome(check: Awaitable[Any]) -> Any:
    try:
        return await check
    except Exception as error:  # noqa: BLE001 - as asyncio.gather(return_exceptions=True) does
        return error


async def _json_body(request: web.Request) -> Any:
    if not request.body_exists:
        return {}
    raw = await read_body(request)
    if not raw:
        return {}
    if request.content_type != "application/json" and not request.content_type.endswith("+json"):
        raise errors.UnsupportedMediaType("Content-Type must be application/json")
    if (request.charset or "utf-8").lower() not in ("utf-8", "utf8"):
        raise errors.UnsupportedMediaType("The charset of JSON must be UTF-8")
    return json.loads(raw)


async def read_body(request: web.Request) -> bytes:
    """Return the whole body, within its size and time limits.

    Raises:
        TooLarge: the body exceeds ``request.client_max_size``.
        BadRequest: it took longer than ``BODY_TIMEOUT_SECONDS``, is incomplete, or violates its Content-Encoding.
    """
    try:
        if request.content.is_eof():  # the body arrived with the head
            return await request.read()
        with paused():
            async with asyncio.timeout(BODY_TIMEOUT_SECONDS):
                return await request.read()
    except TimeoutError:
        request[CLOSE_AFTER_RESPONSE] = True
        raise errors.BadRequest(f"Request body exceeds the timeout of {BODY_TIMEOUT_SECONDS:g} seconds") from None
    except web.HTTPRequestEntityTooLarge:
        request[CLOSE_AFTER_RESPONSE] = True
        size = f"{request.client_max_size / (1 << 20):g} MiB"
        raise errors.TooLarge(f"Request body exceeds the maximum size of {size}") from None
    except (web.RequestPayloadError, ConnectionError, ValueError):  # incomplete, or it violates its Content-Encoding
        request[CLOSE_AFTER_RESPONSE] = True
        raise errors.BadRequest("Request body is incomplete or violates its Content-Encoding") from None


def _query(schema: Any, request: web.Request) -> dict[str, Any]:
    parameters = dict(request.query.items())  # the last of equal names
    for key, value in parameters.items():
        if not key.isprintable():
            raise errors.invalid_field("", "Unknown query parameter.")
        if "\0" in value:
            raise errors.invalid_field(key, json.NUL_MESSAGE)
        if not value.isprintable() and _has_surrogate(value):
            raise errors.invalid_field(key, json.SURROGATE_MESSAGE)
    return dict(_load_query(schema, tuple(parameters.items())))


@lru_cache(1024)  # most queries repeat: ?limit=20
def _load_query(schema: Any, parameters: tuple[tuple[str, str], ...]) -> dict[str, Any]:
    return fields.load(schema, dict(parameters))


def _has_surrogate(text: str) -> bool:
    return any("\ud800" <= character <= "\udfff" for character in text)


def _from_http_exception(error: web.HTTPException) -> ServiceError:
    """Return the service error for an HTTP exception of aiohttp."""
    match error:
        case web.HTTPMethodNotAllowed():
            return errors.MethodNotAllowed("Method not allowed for this path", allowed=sorted(error.allowed_methods))
        case web.HTTPNotFound():
            return errors.NotFound("Resource not found")
        case web.HTTPForbidden():
            return errors.Forbidden(error.text)
        case web.HTTPRequestEntityTooLarge():
            return errors.TooLarge("Request body exceeds the maximum size")
        case web.HTTPServiceUnavailable():
            return errors.Unavailable()
        case web.HTTPServerError():
            return ServiceError()
    return errors.BadRequest(error.reason)
