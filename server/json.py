"""JSON, in and out, for every door: fast (orjson) and strict about hostile input."""

from datetime import UTC, datetime
from typing import Any
from uuid import UUID

import orjson

from server.errors import BadRequest, ValidationFailed

NUL_MESSAGE = "NUL characters are not allowed"
SURROGATE_MESSAGE = "Lone surrogates are not allowed"


def dumps(value: Any) -> bytes:
    """Compact JSON; times as ISO 8601 UTC with milliseconds and ``Z``."""
    return orjson.dumps(value, default=_default, option=orjson.OPT_PASSTHROUGH_DATETIME)


def canonical(value: Any) -> bytes:
    """The same bytes for the same value, whatever the order of its keys."""
    return orjson.dumps(value, default=_default, option=orjson.OPT_PASSTHROUGH_DATETIME | orjson.OPT_SORT_KEYS)


def loads(raw: bytes | str) -> Any:
    """The value of a JSON text from outside.

    Raises:
        BadRequest: it is not JSON (or nested beyond 1,024 levels, or holds a number beyond a double).
        ValidationFailed: it is, but with NUL characters or lone surrogates, which no store could keep.
    """
    try:
        value = orjson.loads(raw)
    except orjson.JSONDecodeError as error:
        if not _is_utf8(raw):
            raise BadRequest("JSON must be UTF-8") from None
        if "surrogate" in str(error):
            raise ValidationFailed(SURROGATE_MESSAGE) from None
        raise BadRequest(f"Malformed JSON: {error}") from None
    # Only an escape can bring a NUL; the search of the raw text spares all others the walk.
    escaped = "\\u0000" in raw if isinstance(raw, str) else b"\\u0000" in raw
    if escaped and _has_nul(value):
        raise ValidationFailed(NUL_MESSAGE)
    return value


def _is_utf8(raw: bytes | str) -> bool:
    if isinstance(raw, bytes):
        try:
            raw.decode()
        except UnicodeDecodeError:
            return False
    return True


def timestamp(moment: datetime) -> str:
    return moment.astimezone(UTC).isoformat(timespec="milliseconds").removesuffix("+00:00") + "Z"


def _default(value: Any) -> str:
    if isinstance(value, datetime):
        return timestamp(value)
    if isinstance(value, UUID):  # asyncpg's subclass; orjson knows the plain class only
        return str(value)
    raise TypeError(f"not serialisable: {type(value).__name__}")


def _has_nul(value: Any) -> bool:
    if isinstance(value, str):
        return "\0" in value
    if isinstance(value, dict):
        return any("\0" in key or _has_nul(each) for key, each in value.items())
    return isinstance(value, list) and any(map(_has_nul, value))
