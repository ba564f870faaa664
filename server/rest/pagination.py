"""Keyset pagination: ``?limit=&cursor=`` in requests, ``{items, nextCursor}`` in responses."""

import base64
import binascii
import functools
import re
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from typing import Any
from uuid import UUID

from marshmallow import Schema as MarshmallowSchema
from marshmallow import fields, validate

from server import json
from server.errors import ServiceError, invalid_field
from server.fields import QueryInteger, Schema, parse_id

DEFAULT_LIMIT, MAX_LIMIT = 20, 100
_INTEGER = re.compile(r"-?[0-9]{1,19}")


class PageQuery(Schema):
    limit = QueryInteger(load_default=DEFAULT_LIMIT, validate=validate.Range(1, MAX_LIMIT))
    cursor = fields.String(load_default=None, validate=validate.Length(max=1000))


def encode_cursor(*keys: Any, list_name: str) -> str:
    """Return an opaque keyset cursor: the list with its order, and the sort keys of the last item of the page."""
    return base64.urlsafe_b64encode(json.dumps([list_name, *keys])).decode().rstrip("=")


def decode_cursor(cursor: str | None, *kinds: type, list_name: str) -> tuple[Any, ...]:
    """Return the sort keys in a keyset cursor, each of the expected kind; all None for the first page.

    Raises:
        ValidationFailed: the cursor does not belong to that list.
    """
    if cursor is None:
        return (None,) * len(kinds)
    try:
        keys = json.loads(base64.b64decode(cursor + "=" * (-len(cursor) % 4), b"-_", validate=True))
        if not isinstance(keys, list) or keys[:1] != [list_name]:
            raise ValueError("not a sort key of this list")
        return tuple(_parse(kind, key) for kind, key in zip(kinds, keys[1:], strict=True))
    except (ValueError, TypeError, OverflowError, binascii.Error, ServiceError):
        raise invalid_field("cursor", "Cursor does not belong to this list.") from None


def _parse(kind: type, key: Any) -> Any:
    if not isinstance(key, str):
        raise TypeError("cursors hold strings")
    value = _PARSERS[kind](key)
    if value is None:
        raise ValueError("not a sort key of this list")
    return value


def _parse_bigint(key: str) -> int | None:
    value = int(key) if _INTEGER.fullmatch(key) else None
    return None if value is None or abs(value) >= 1 << 63 else value


def _parse_time(key: str) -> datetime:
    time = datetime.fromisoformat(key)
    if time.tzinfo is None:
        raise ValueError("no time zone")
    return time.astimezone(UTC)  # OverflowError before the first year and after the last


_PARSERS: dict[type, Callable[[str], Any]] = {str: str, int: _parse_bigint, UUID: parse_id, datetime: _parse_time}


def paginate(rows: Sequence[Any], limit: int, *keys: str, list_name: str) -> tuple[Sequence[Any], str | None]:
    """Split rows that were read with ``limit + 1``: return those of the page, and the cursor of the next one."""
    if len(rows) <= limit:
        return rows, None
    last = rows[limit - 1]
    return rows[:limit], encode_cursor(*(_format_key(last[key]) for key in keys), list_name=list_name)


def _format_key(key: Any) -> str:
    # Full precision: times in milliseconds, as in our JSON, would skip or repeat rows.
    return str(key.isoformat()) if hasattr(key, "isoformat") else str(key)


@functools.cache  # apispec accepts one class per name in the OpenAPI document
def page_schema(item: type[Schema], **extra_fields: fields.Field[Any]) -> type[MarshmallowSchema]:
    """Return the schema of a page of these items, with further fields, for the OpenAPI document."""
    shape: dict[str, Any] = {
        "items": fields.List(fields.Nested(item)),
        "next_cursor": fields.String(allow_none=True, metadata={"description": "null on the last page"}),
        **extra_fields,
    }
    return Schema.from_dict(shape, name=f"{item.__name__}Page")
