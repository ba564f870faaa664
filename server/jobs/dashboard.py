"""SAQ's dashboard for operators: the messages that wait in Redis, and the workers that take them.

It is read-only. The records in MongoDB decide about jobs: retrying or aborting a message without its record would run
an attempt that the record does not know, or strand one. Therefore the page has none of SAQ's buttons, and the server
rejects the requests that they send.
"""

import gzip
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from aiohttp import web
from aiohttp.typedefs import Middleware
from saq.web.common import STATIC_PATH, render

from server.errors import MethodNotAllowed, NotFound
from server.jobs.queue import PriorityQueue
from server.ratelimit import limit
from server.resources import translate_store_errors
from server.rest import assets, responses
from server.rest.assets import Asset
from server.rest.marks import public

PREFIX = "/ops/queues"
READ_ONLY_MESSAGE = "This page is read-only. To cancel or retry a job, use POST /api/v1/jobs/{id}/cancel or /retry"
SCRIPT_PATCHES = (
    ('h("grid", buttons)', f'h("p", "{READ_ONLY_MESSAGE}")'),
    ('href: "/queues/" + job.queue', 'href: root_path + "/queues/" + job.queue'),
)
"""Texts of SAQ's script and their replacements. A test fails if a new version of SAQ has no such text."""
_TITLE = "<title>SAQ</title>"
_HEAD = """<title>Queues</title>
        <link rel="icon" href="data:,">
        <style>@media (max-width: 1200px) { main table { display: block; overflow-x: auto } }</style>"""
_PAGE_HEADERS = {
    "Content-Security-Policy": "default-src 'self'; img-src 'self' data:; style-src 'self' 'unsafe-inline'; "
    "script-src 'self' 'unsafe-inline'; frame-ancestors 'none'"
}
_CONTENT_TYPES = {"app.js": "text/javascript", "snabbdom.js": "text/javascript", "pico.min.css": "text/css"}


def make_app(queues: Mapping[str, PriorityQueue], middlewares: Sequence[Middleware]) -> web.Application:
    """Return the application to mount at PREFIX, for the queues by priority class.

    The middlewares authorize the requests.
    """
    app = web.Application(middlewares=middlewares)
    files = {
        # No shared cache may store it: it is for operators only.
        name: Asset(lambda name=name: read_static_file(name), kind, cache=f"private, {assets.CACHE_IMMUTABLE}")  # type: ignore[misc]
        for name, kind in _CONTENT_TYPES.items()
    }
    page = Asset(lambda: _render_page(files), "text/html", cache="private, no-cache", headers=_PAGE_HEADERS)
    api = QueueApi(queues)
    app.router.add_get("", _add_slash)
    for path in ("/", "/queues/{queue}", "/queues/{queue}/jobs/{job}"):
        app.router.add_get(path, page.respond)
    for name, asset in files.items():
        app.router.add_get(f"/static/{name}", asset.respond)
    app.router.add_get("/api/queues", api.list_queues)
    app.router.add_get("/api/queues/{queue}", api.read_queue)
    app.router.add_get("/api/queues/{queue}/jobs/{job}", api.read_message)
    app.router.add_post("/api/queues/{queue}/jobs/{job}/{change}", _reject_change)
    return app


def read_static_file(name: str) -> bytes:
    """Return a static file of SAQ's page, unpacked and with ``SCRIPT_PATCHES`` applied."""
    path = STATIC_PATH / name
    content = path.read_bytes() if path.exists() else gzip.decompress(path.with_name(f"{name}.gz").read_bytes())
    for old, new in SCRIPT_PATCHES if name == "app.js" else ():
        content = content.replace(old.encode(), new.encode())
    return content


def _render_page(files: Mapping[str, Asset]) -> bytes:
    page: str = render(root_path=PREFIX).replace(_TITLE, _HEAD)
    for name, asset in files.items():
        page = page.replace(f"/static/{name}", f"/static/{name}?v={asset.tag}")
    return page.encode()


@limit(None)
@public
async def _add_slash(_: web.Request) -> web.StreamResponse:
    """Redirect to the path with a slash: the page's script works only there."""
    raise web.HTTPFound(f"{PREFIX}/")


@limit(None)
@public
async def _reject_change(_: web.Request) -> web.StreamResponse:
    raise MethodNotAllowed(READ_ONLY_MESSAGE)


@dataclass(frozen=True)
class QueueApi:
    """The API that the page calls. Queues are named by priority class, without the hash tags that Redis needs."""

    queues: Mapping[str, PriorityQueue]

    @limit(None)
    @public
    async def list_queues(self, _: web.Request) -> web.Response:
        with translate_store_errors():
            return responses.json(
                {"queues": [_queue_view(name, await queue.info()) for name, queue in self.queues.items()]}
            )

    @limit(None)
    @public
    async def read_queue(self, request: web.Request) -> web.Response:
        name, queue = self._find_queue(request)
        with translate_store_errors():
            return responses.json({"queue": _queue_view(name, await queue.info(jobs=True))})

    @limit(None)
    @public
    async def read_message(self, request: web.Request) -> web.Response:
        name, queue = self._find_queue(request)
        with translate_store_errors():
            message: Any = await queue.job(f"{queue.name}:{request.match_info['job']}")
        if message is None:
            raise NotFound("Message not found: its attempt has ended; see GET /api/v1/jobs/{id}")
        return responses.json({"job": _message_view(name, message.to_dict())})

    def _find_queue(self, request: web.Request) -> tuple[str, PriorityQueue]:
        name = request.match_info["queue"]
        if name not in self.queues:
            raise NotFound(f"Queue not found; the queues are {', '.join(self.queues)}")
        return name, self.queues[name]


def _queue_view(name: str, info: Any) -> dict[str, Any]:
    return {**info, "name": name, "jobs": [_message_view(name, message) for message in info["jobs"]]}


def _message_view(name: str, message: Mapping[str, Any]) -> dict[str, Any]:
    """Return a message as SAQ's page expects it: ``key`` is ``<job id>:<claim>``, ``kwargs`` is text."""
    arguments = message.get("kwargs") or {}
    text = ", ".join(f"{key}: {value}" for key, value in arguments.items() if value is not None)
    return {**message, "queue": name, "key": message["key"].partition(":")[2], "kwargs": text}
