"""Health, readiness and metrics."""

import asyncio
import time
from collections.abc import Awaitable, Mapping
from typing import Any

from aiohttp import web
from aiohttp_apispec import docs
from redis.exceptions import RedisError

from server import __version__
from server.errors import NotFound
from server.jobs.handlers import ROSTER
from server.ops import exposition, operators
from server.ratelimit import limit
from server.resources import ping
from server.rest import answers
from server.rest.keys import RESOURCES
from server.rest.marks import public

routes = web.RouteTableDef()
CHECK_SECONDS = 1.0
STARTED = web.AppKey("started", float)


class Draining:
    """Set once, when the process begins to stop."""

    def __init__(self) -> None:
        self.begun = False


DRAINING = web.AppKey("draining", Draining)
_ANSWERS = {
    "health": {200: {"description": "with the version, and the seconds since the start"}},
    "ready": {
        200: {"description": "every store answers; with what the workers report"},
        503: {"description": "one does not, or the process is stopping; with each store's state and latency"},
    },
    "metrics": {
        200: {"description": "the text format; of all processes of this host's supervisor"},
        401: {"description": "needs the operators' Basic credentials, where these are set"},
        404: {"description": "in production, where none are set"},
    },
}


@routes.get("/health")
@docs(tags=["operations"], summary="The process lives", responses=_ANSWERS["health"])
@limit(None)
@public
async def health(request: web.Request) -> web.Response:
    """The process lives."""
    uptime = round(time.monotonic() - request.app[STARTED], 3)
    return answers.json({"status": "ok", "uptime": uptime, "version": __version__})


@routes.get("/health/ready")
@docs(tags=["operations"], summary="Whether requests should be sent here", responses=_ANSWERS["ready"])
@limit(None)
@public
async def ready(request: web.Request) -> web.Response:
    """Whether requests should be sent here: every store answers, and the process is not stopping."""
    resources = request.app[RESOURCES]
    stores = await check_stores(
        {
            "postgresql": resources.db.ping(),
            "redis": ping(resources.redis),
            "mongodb": resources.mongo.command("ping"),
        }
    )
    draining = request.app[DRAINING].begun
    up = not draining and all(store["status"] == "up" for store in stores.values())
    status = "draining" if draining else "ready" if up else "unavailable"
    body = {"status": status, "version": __version__, "stores": stores, "workers": await _workers(request)}
    return answers.json(body, status=200 if up else 503, headers=None if up else {"Retry-After": "2"})


@routes.get("/metrics")
@docs(tags=["operations"], summary="For Prometheus", produces=["text/plain"], responses=_ANSWERS["metrics"])
@limit(None)
@public
async def metrics(request: web.Request) -> web.Response:
    stores = request.app[RESOURCES]
    if operators.are_shut_out(stores.settings):
        raise NotFound("No such path")
    return await exposition.answer(request, stores)


async def _workers(request: web.Request) -> list[dict[str, Any]] | None:
    """What the workers report of themselves; None where it is not known. Readiness does not depend on them."""
    try:
        workers = await request.app[ROSTER].workers()
    except (RedisError, OSError):
        return None
    return [{"worker": each.worker, "sandbox": each.tier, "languages": each.languages} for each in workers]


async def check_stores(pings: Mapping[str, Awaitable[Any]]) -> dict[str, dict[str, Any]]:
    """State and latency in milliseconds of each store, asked at once."""
    states = await asyncio.gather(*(_check(ping) for ping in pings.values()))
    return dict(zip(pings, states, strict=True))


async def _check(ping: Awaitable[Any]) -> dict[str, Any]:
    started = time.perf_counter()
    try:
        async with asyncio.timeout(CHECK_SECONDS):
            await ping
    except Exception as error:  # noqa: BLE001 - whatever it is, the store is not usable; the kind is told
        return {"status": "down", "error": type(error).__name__}
    return {"status": "up", "latencyMs": round((time.perf_counter() - started) * 1000, 2)}
