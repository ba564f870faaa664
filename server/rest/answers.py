"""What handlers answer with: one entity, a new entity, a page, nothing."""

from collections.abc import Mapping, Sequence
from typing import Any

from aiohttp import web
from marshmallow import Schema

from server.json import dumps
from server.rest.etags import etag, unchanged


def json(body: Any, *, status: int = 200, headers: Mapping[str, str] | None = None) -> web.Response:
    """A JSON answer; ``body`` may be JSON already (bytes)."""
    raw = body if isinstance(body, bytes) else dumps(body)
    return web.Response(status=status, body=raw, content_type="application/json", headers=headers)


def entity(request: web.Request, schema: Schema, row: Any, *, role: str = "") -> web.Response:
    """One entity, bare, with the ETag of its ``revision``; 304 where the client has it."""
    return tagged(request, schema.dump(row), tag=etag(row["revision"], role))


def tagged(request: web.Request, body: Any, *, tag: str) -> web.Response:
    headers = {"ETag": f'"{tag}"'}
    if request.method in ("GET", "HEAD") and unchanged(request, tag):
        return web.Response(status=304, headers=headers)
    return json(body, headers=headers)


def created(location: str, body: Any, *, tag: str | None = None) -> web.Response:
    headers = {"Location": location} | ({"ETag": f'"{tag}"'} if tag else {})
    return json(body, status=201, headers=headers)


def page(schema: Schema, rows: Sequence[Any], next_cursor: str | None, **beside: Any) -> web.Response:
    """A list: the items shown, the cursor of the next page, and what stands beside them."""
    return page_of_shown(schema.dump(rows, many=True), next_cursor, **beside)


def page_of_shown(items: Sequence[Any], next_cursor: str | None, **beside: Any) -> web.Response:
    """The same of items that are JSON already, or will be without a schema."""
    return json({"items": items, "nextCursor": next_cursor, **beside})


def secret(response: web.Response) -> web.Response:
    """An answer with a token in it: no cache may keep it."""
    response.headers["Cache-Control"] = "no-store"
    return response


def nothing() -> web.Response:
    return web.Response(status=204)
