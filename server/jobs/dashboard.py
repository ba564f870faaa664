"""SAQ's dashboard for operators: what waits in Redis, and who works on it. To look at, not to touch: the records
decide, and a message that is retried or aborted here would change nothing."""

from collections.abc import Iterable, Sequence
from typing import Any

from aiohttp import web
from aiohttp.typedefs import Middleware
from saq.queue import Queue
from saq.queue.redis import RedisQueue
from saq.web import aiohttp as saq
from saq.web.common import STATIC_PATH, render

from server.ratelimit import limit
from server.rest.marks import public

PREFIX = "/ops/queues"
_ASSETS = {"app.js": "text/javascript", "snabbdom.js": "text/javascript", "pico.min.css": "text/css"}
_PAGE_POLICY = {
    "Content-Security-Policy": "default-src 'self'; img-src 'self' data:; style-src 'self' 'unsafe-inline'; "
    "script-src 'self' 'unsafe-inline'; frame-ancestors 'none'"
}


def make(queues: Iterable[RedisQueue], middlewares: Sequence[Middleware]) -> web.Application:
    """To be mounted at PREFIX; the middlewares decide who may see it."""
    app = web.Application(middlewares=middlewares)
    known: dict[str, Queue] = {each.name: each for each in queues}
    app[saq.QUEUES_KEY] = known
    # By default aiohttp takes no braces in a name, and those of our queues have some.
    for path, handler in (
        ("", _page),
        ("/", _page),
        ("/queues/{queue:[^/]+}", _page),
        ("/queues/{queue:[^/]+}/jobs/{job:[^/]+}", _page),
        ("/static/{name}", _asset),
        ("/api/queues", _queues),
        ("/api/queues/{queue:[^/]+}", _queues),
        ("/api/queues/{queue:[^/]+}/jobs/{job:[^/]+}", _message),
    ):
        app.router.add_get(path, limit(None)(public(handler)))
    return app


async def _page(_: web.Request) -> web.Response:
    return web.Response(text=render(root_path=PREFIX), content_type="text/html", headers=_PAGE_POLICY)


async def _asset(request: web.Request) -> web.StreamResponse:
    name = request.match_info["name"]
    if name not in _ASSETS:
        raise web.HTTPNotFound
    path = STATIC_PATH / name
    if path.exists():
        return web.FileResponse(path)
    packed = path.with_name(f"{name}.gz").read_bytes()  # a few kilobytes
    return web.Response(body=packed, content_type=_ASSETS[name], headers={"Content-Encoding": "gzip"})


async def _queues(request: web.Request) -> web.StreamResponse:
    _known(request)
    return await saq.queues_(request)


async def _message(request: web.Request) -> web.StreamResponse:
    queue: Any = _known(request)
    if await queue.job(request.match_info["job"]) is None:
        raise web.HTTPNotFound
    return await saq.jobs(request)


def _known(request: web.Request) -> RedisQueue | None:
    name = request.match_info.get("queue")
    queues: Any = request.app[saq.QUEUES_KEY]
    if name is not None and name not in queues:
        raise web.HTTPNotFound
    return queues[name] if name else None
