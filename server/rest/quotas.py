"""Rate limits that a handler consumes by itself; the response headers report the quota."""

from aiohttp import web

from server.ratelimit import limit_key
from server.rest.keys import CLIENT, COUNTED, HEADERS, LIMITER


async def count(request: web.Request, name: str, key: str) -> None:
    """Consume one request of the rate limit ``name`` for ``key``.

    Raises:
        QuotaExceeded: the quota is used up.
    """
    request[COUNTED] = True
    quota = await request.app[LIMITER].take(name, key)
    if quota is not None:
        request[HEADERS].update(quota.headers())


async def count_address(request: web.Request) -> None:
    """Consume one request of the client address's rate limit for sign-ins.

    Raises:
        QuotaExceeded: the quota is used up.
    """
    await count(request, "auth", limit_key("auth", client=request[CLIENT]))
