"""Health, readiness and metrics."""

import asyncio
from typing import Any

from aiohttp import web
from aiohttp_apispec import docs
from redis.exceptions import RedisError

from server import __version__
from server.errors import NotFound
from server.jobs.handlers import ROSTER
from server.ops import exposition, operators, stores
from server.ops.health import alive
from server.ratelimit import limit
from server.rest import answers
from server.rest.keys import RESOURCES
from server.rest.marks import public

routes = web.RouteTableDef()
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
    return answers.json(alive(since=request.app[STARTED]))


@routes.get("/health/ready")
@docs(tags=["operations"], summary="Whether requests should be sent here", responses=_ANSWERS["ready"])
@limit(None)
@public
async def ready(request: web.Request) -> web.Response:
    """Whether requests should be sent here: every store answers, and the process is not stopping."""
    states, workers = await asyncio.gather(stores.check(request.app[RESOURCES]), _workers(request))
    draining = request.app[DRAINING].begun
    up = not draining and all(each["status"] == "up" for each in states.values())
    status = "draining" if draining else "ready" if up else "unavailable"
    body = {"status": status, "version": __version__, "stores": states, "workers": workers}
    return answers.json(body, status=200 if up else 503, headers=None if up else {"Retry-After": "2"})


@routes.get("/metrics")
@docs(tags=["operations"], summary="For Prometheus", produces=["text/plain"], responses=_ANSWERS["metrics"])
@limit(None)
@public
async def metrics(request: web.Request) -> web.Response:
    opened = request.app[RESOURCES]
    if operators.are_shut_out(opened.settings):
        raise NotFound("No such path")
    return await exposition.answer(request, opened)


async def _workers(request: web.Request) -> list[dict[str, Any]] | None:
    """What the workers report of themselves; None where it is not known. Readiness does not depend on them."""
    try:
        async with asyncio.timeout(stores.CHECK_SECONDS):
            workers = await request.app[ROSTER].workers()
    except (RedisError, OSError):
        return None
    return [{"worker": each.worker, "sandbox": each.tier, "languages": each.languages} for each in workers]
