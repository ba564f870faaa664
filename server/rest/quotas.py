"""Rate limits that a handler consumes by itself; the response headers report the quota."""

from aiohttp import web

from server.ratelimit import limit_key
from server.rest.keys import CLIENT_ADDRESS, LIMITER, RATE_LIMIT_COUNTED, RESPONSE_HEADERS


async def consume(request: web.Request, name: str, key: str) -> None:
    """Consume one request of the rate limit ``name`` for ``key``.

    Raises:
        QuotaExceeded: the quota is used up.
    """
    request[RATE_LIMIT_COUNTED] = True
    quota = await request.app[LIMITER].consume(name, key)
    if quota is not None:
        request[RESPONSE_HEADERS].update(quota.headers())


async def consume_auth_for_address(request: web.Request) -> None:
    """Consume one request of the rate limit ``auth`` (sign-ins) for the client's address.

    Raises:
        QuotaExceeded: the quota is used up.
    """
    await consume(request, "auth", limit_key("auth", client=request[CLIENT_ADDRESS]))
