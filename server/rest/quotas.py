"""Budgets that a handler takes from by itself, shown in the headers of its answer."""

from aiohttp import web

from server.ratelimit import limit_key
from server.rest.keys import CLIENT, COUNTED, HEADERS, LIMITER


async def count(request: web.Request, name: str, key: str) -> None:
    """Take a request from the budget ``name`` of ``key``.

    Raises:
        QuotaExceeded: nothing is left.
    """
    request[COUNTED] = True
    quota = await request.app[LIMITER].take(name, key)
    if quota is not None:
        request[HEADERS].update(quota.headers())


async def count_address(request: web.Request) -> None:
    """Take a request from the budget of its address for sign-ins.

    Raises:
        QuotaExceeded: nothing is left.
    """
    await count(request, "auth", limit_key("auth", client=request[CLIENT]))
