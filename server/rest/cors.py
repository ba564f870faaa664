"""Cross-origin requests (CORS), by aiohttp-cors, and OPTIONS: for every response below ``/api``, of any status.

aiohttp-cors alone adds its headers to responses of routes only, and treats every OPTIONS request as a preflight. It
ignores WebSockets: the socket endpoint checks the origin itself.
"""

from collections.abc import Awaitable, Callable, Sequence
from typing import Any

import aiohttp_cors
from aiohttp import hdrs, web
from aiohttp_cors.urldispatcher_router_adapter import ResourcesUrlDispatcherRouterAdapter

from server.rest.keys import MALFORMED_REQUEST

PREFIX = "/api/"
MAX_AGE_SECONDS = 3600  # of a preflight in a browser's cache
_NO_METHOD = "-"
RequestHandlerFunction = Callable[[web.Request], Awaitable[web.StreamResponse]]


def allow_origins(app: web.Application, origins: Sequence[str]) -> None:
    """Set up CORS for all routes that the application has so far; ``*`` allows every origin."""
    options = aiohttp_cors.ResourceOptions(
        allow_headers="*", allow_methods="*", expose_headers="*", max_age=MAX_AGE_SECONDS
    )
    defaults = dict.fromkeys(origins, options)
    cors = aiohttp_cors.CorsConfig(app, defaults=defaults, router_adapter=_Adapter(app.router, defaults))
    for route in list(app.router.routes()):
        if route.resource is not None and route.resource.canonical.startswith(PREFIX):
            cors.add(route)
    if len(origins) == 1:
        app.on_response_prepare.append(_allow_origin_for_malformed_requests(origins[0]))
    if "*" not in origins:
        app.on_response_prepare.append(_vary_by_origin)


class _Adapter(ResourcesUrlDispatcherRouterAdapter):  # type: ignore[misc]
    def add_preflight_handler(self, routing_entity: Any, handler: RequestHandlerFunction) -> None:
        async def handle_options(request: web.Request) -> web.StreamResponse:
            return await handler(request) if _is_preflight(request) else await _allowed_methods(request)

        super().add_preflight_handler(routing_entity, handle_options)

    def is_preflight_request(self, request: web.Request) -> bool:
        return _is_preflight(request) and bool(super().is_preflight_request(request))

    def is_cors_enabled_on_request(self, request: web.Request) -> bool:
        return request.path.startswith(PREFIX)

    def get_non_preflight_request_config(self, _: web.Request) -> Any:
        return self._default_config


def _is_preflight(request: web.Request) -> bool:
    """Return whether the request is a preflight (Fetch standard, "CORS-preflight request")."""
    return (
        request.method == hdrs.METH_OPTIONS
        and hdrs.ORIGIN in request.headers
        and hdrs.ACCESS_CONTROL_REQUEST_METHOD in request.headers
    )


async def _allowed_methods(request: web.Request) -> web.Response:
    """Respond to OPTIONS with the allowed methods (RFC 9110, section 9.3.7)."""
    unmatched = await request.app.router.resolve(request.clone(method=_NO_METHOD))
    error = unmatched.http_exception
    allowed = error.allowed_methods if isinstance(error, web.HTTPMethodNotAllowed) else ()
    return web.Response(status=204, headers={hdrs.ALLOW: ", ".join(sorted(allowed))})


def _allow_origin_for_malformed_requests(origin: str) -> Callable[[web.Request, web.StreamResponse], Awaitable[None]]:
    """Return a signal that allows the only configured origin: a malformed request's own path and origin are unknown."""

    async def signal(request: web.Request, response: web.StreamResponse) -> None:
        if MALFORMED_REQUEST in request:
            response.headers[hdrs.ACCESS_CONTROL_ALLOW_ORIGIN] = origin

    return signal


async def _vary_by_origin(_: web.Request, response: web.StreamResponse) -> None:
    """Add ``Vary: Origin``, as a signal: aiohttp-cors responds differently to each origin without telling caches."""
    response.headers.add("Vary", "Origin")
