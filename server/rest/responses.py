"""Responses of handlers: an entity, a created entity, a page, no content."""

from collections.abc import Mapping, Sequence
from typing import Any

from aiohttp import web
from marshmallow import Schema

from server.json import dumps
from server.rest.etags import etag, is_not_modified


def json(body: Any, *, status: int = 200, headers: Mapping[str, str] | None = None) -> web.Response:
    """Return a JSON response; ``body`` may be JSON already (bytes)."""
    raw = body if isinstance(body, bytes) else dumps(body)
    return web.Response(status=status, body=raw, content_type="application/json", headers=headers)


def entity(request: web.Request, schema: Schema, row: Any, *, role: str = "") -> web.Response:
    """Return an entity without a wrapper, with the ETag of its ``revision``; 304 if the client has it."""
    return with_etag(request, schema.dump(row), tag=etag(row["revision"], role))


def with_etag(request: web.Request, body: Any, *, tag: str) -> web.Response:
    headers = {"ETag": f'"{tag}"'}
    if request.method in ("GET", "HEAD") and is_not_modified(request, tag):
        return web.Response(status=304, headers=headers)
    return json(body, headers=headers)


def created(location: str, body: Any, *, tag: str | None = None) -> web.Response:
    headers = {"Location": location} | ({"ETag": f'"{tag}"'} if tag else {})
    return json(body, status=201, headers=headers)


def page(schema: Schema, rows: Sequence[Any], next_cursor: str | None, **extra_fields: Any) -> web.Response:
    """Return a page: the items, the cursor of the next page, and further fields."""
    return page_of_items(schema.dump(rows, many=True), next_cursor, **extra_fields)


def page_of_items(items: Sequence[Any], next_cursor: str | None, **extra_fields: Any) -> web.Response:
    """Return a page of items that are JSON already, or that need no schema."""
    return json({"items": items, "nextCursor": next_cursor, **extra_fields})


def no_store(response: web.Response) -> web.Response:
    """Forbid caching of a response that contains a token."""
    response.headers["Cache-Control"] = "no-store"
    return response


def no_content() -> web.Response:
    return web.Response(status=204)
