"""REST handlers of liveness, readiness and metrics."""

import asyncio
from typing import Any

from aiohttp import web
from aiohttp_apispec import docs
from redis.exceptions import RedisError

from server import __version__
from server.errors import NotFound
from server.jobs.handlers import WORKER_REGISTRY
from server.ops import exposition, operators, store_health
from server.ops.health import liveness
from server.ratelimit import limit
from server.rest import responses
from server.rest.keys import RESOURCES
from server.rest.marks import public

routes = web.RouteTableDef()
STARTED_AT = web.AppKey("started_at", float)


class DrainState:
    """A flag that is set once, when the graceful shutdown begins."""

    def __init__(self) -> None:
        self.is_draining = False


DRAINING = web.AppKey("draining", DrainState)
_RESPONSES = {
    "health": {200: {"description": "version, and seconds since the start"}},
    "ready": {
        200: {"description": "every store responds; with state and latency of each store, and the workers"},
        503: {"description": "a store does not respond, or the process is shutting down; the same body"},
    },
    "metrics": {
        200: {"description": "text format; the sum over all processes of this host's supervisor"},
        401: {"description": "the operators' Basic credentials are set, and are required"},
        404: {"description": "in production, no credentials are set"},
    },
}


@routes.get("/health")
@docs(tags=["operations"], summary="Check that the process is running (liveness)", responses=_RESPONSES["health"])
@limit(None)
@public
async def health(request: web.Request) -> web.Response:
    return responses.json(liveness(started_at=request.app[STARTED_AT]))


@routes.get("/health/ready")
@docs(
    tags=["operations"], summary="Check that the process can take requests (readiness)", responses=_RESPONSES["ready"]
)
@limit(None)
@public
async def ready(request: web.Request) -> web.Response:
    """Respond 200 if every store responds and the process is not shutting down, else 503."""
    states, workers = await asyncio.gather(store_health.check(request.app[RESOURCES]), _workers(request))
    draining = request.app[DRAINING].is_draining
    up = not draining and all(state["status"] == "up" for state in states.values())
    status = "draining" if draining else "ready" if up else "unavailable"
    body = {"status": status, "version": __version__, "stores": states, "workers": workers}
    return responses.json(body, status=200 if up else 503, headers=None if up else {"Retry-After": "2"})


@routes.get("/metrics")
@docs(
    tags=["operations"],
    summary="Read the metrics, for Prometheus",
    produces=["text/plain"],
    responses=_RESPONSES["metrics"],
)
@limit(None)
@public
async def metrics(request: web.Request) -> web.Response:
    stores = request.app[RESOURCES]
    if operators.disabled(stores.settings):
        raise NotFound("Resource not found")
    return await exposition.metrics_response(request, stores)


async def _workers(request: web.Request) -> list[dict[str, Any]] | None:
    """Return the registered workers, or None during an outage of Redis. Readiness does not depend on them."""
    try:
        async with asyncio.timeout(store_health.CHECK_TIMEOUT_SECONDS):
            workers = await request.app[WORKER_REGISTRY].workers()
    except (RedisError, OSError):
        return None
    return [{"worker": worker.worker, "sandbox": worker.tier, "languages": worker.languages} for worker in workers]
