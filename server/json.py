"""JSON input and output of all transports: fast (orjson) and strict about hostile input."""

import json as standard
import re
from datetime import UTC, datetime
from typing import Any
from uuid import UUID

import orjson

from server.errors import BadRequest, ValidationFailed

NUL_MESSAGE = "NUL characters are not allowed"
SURROGATE_MESSAGE = "Lone surrogates are not allowed"
INTEGER_MESSAGE = "Integers must be within the signed 64-bit range"
MIN_INTEGER, MAX_INTEGER = -(1 << 63), (1 << 63) - 1
MAX_SEARCHED_BYTES = 64 << 10  # of a text that is searched for the path of a bad integer
MAX_DEPTH = 200  # levels of an input; responses nest it further
_MAX_ORJSON_DEPTH = 254  # levels that orjson can write
_DIGITS_TO_ZERO = bytes.maketrans(b"123456789", b"0" * 9)
_LONG_INTEGER = b"0" * 19  # an integer with fewer digits fits into 64 bits
_OUT_OF_RANGE = object()
_NUL = re.compile(rb"(?<!\\)(?:\\\\)*\\u0000")  # JSON text can contain NUL as an escape only


class IntegerOutOfRangeError(ValidationFailed):
    """An integer beyond 64 bits; ``value`` is the parsed text with a float for it, or None if orjson rejects it."""

    def __init__(self, field: str, value: Any) -> None:
        super().__init__(INTEGER_MESSAGE, details=[{"field": field, "message": f"{INTEGER_MESSAGE}."}])
        self.value = value


def dumps(value: Any) -> bytes:
    """Return compact JSON; times are ISO 8601 in UTC with milliseconds and ``Z``."""
    return orjson.dumps(value, default=_default, option=orjson.OPT_PASSTHROUGH_DATETIME)


def canonical(value: Any) -> bytes:
    """Return JSON that does not depend on the order of keys: equal values have equal bytes."""
    return orjson.dumps(value, default=_default, option=orjson.OPT_PASSTHROUGH_DATETIME | orjson.OPT_SORT_KEYS)


def loads(raw: bytes | str) -> Any:
    """Return the value of a JSON text from a client.

    Raises:
        BadRequest: the text is not JSON (or nested beyond 1,024 levels, or contains a number beyond a double).
        ValidationFailed: it is JSON, but nested too deep, or contains NUL characters or lone surrogates, which no
            store can keep, or an integer beyond 64 bits (``IntegerOutOfRangeError``).
    """
    try:
        value = orjson.loads(raw)
    except orjson.JSONDecodeError as error:
        _check_integers(raw, None)
        if not _is_utf8(raw):
            raise BadRequest("JSON must be UTF-8") from None
        if "surrogate" in str(error):
            raise _rejected(SURROGATE_MESSAGE) from None
        raise BadRequest(f"Malformed JSON: {error}") from None
    # Both checks run in C: a walk in Python would block the event loop for long, and could not go as deep.
    text = raw.encode("utf-8", "replace") if isinstance(raw, str) else raw
    if text.count(b"[") + text.count(b"{") > MAX_DEPTH and _is_too_deep(value):
        raise _rejected(f"JSON must not be nested deeper than {MAX_DEPTH} levels")
    if _NUL.search(text):
        raise _rejected(NUL_MESSAGE)
    _check_integers(text, value)
    return value


def _check_integers(raw: bytes | str, value: Any) -> None:
    """Raise IntegerOutOfRangeError if the text contains an integer beyond 64 bits.

    orjson turns such integers into floats. The standard library does not, but is slower.
    """
    text = raw.encode("utf-8", "replace") if isinstance(raw, str) else raw
    if _LONG_INTEGER not in text.translate(_DIGITS_TO_ZERO):
        return
    out_of_range: list[object] = []

    def integer(digits: str) -> object:
        if len(digits) < len(_LONG_INTEGER) or (len(digits) <= 20 and MIN_INTEGER <= int(digits) <= MAX_INTEGER):
            return 0
        out_of_range.append(_OUT_OF_RANGE)
        return _OUT_OF_RANGE

    try:
        parsed = standard.loads(text, parse_int=integer)
        path = _path_of_out_of_range(parsed) if out_of_range and len(text) <= MAX_SEARCHED_BYTES else None
    except (ValueError, RecursionError):  # then it is not JSON for orjson either
        return
    if out_of_range:
        raise IntegerOutOfRangeError(path or "", value)


def _path_of_out_of_range(value: Any) -> str | None:
    """Return the dotted path of the first integer beyond 64 bits, or None if there is none."""
    if value is _OUT_OF_RANGE:
        return ""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in items:
        if (path := _path_of_out_of_range(item)) is not None:
            return f"{key}.{path}".rstrip(".")[:200]
    return None


def _is_utf8(raw: bytes | str) -> bool:
    if isinstance(raw, bytes):
        try:
            raw.decode()
        except UnicodeDecodeError:
            return False
    return True


def format_timestamp(moment: datetime) -> str:
    utc = moment if moment.tzinfo is UTC else moment.astimezone(UTC)
    text = orjson.dumps(utc).decode()  # takes a sixth of isoformat's time; omits a fraction of 0
    return f"{text[1:20]}{text[20:24] if utc.microsecond else '.000'}Z"


def _default(value: Any) -> str:
    if isinstance(value, datetime):
        return format_timestamp(value)
    if isinstance(value, UUID):  # asyncpg's subclass; orjson supports the plain class only
        return str(value)
    raise TypeError(f"not serializable: {type(value).__name__}")


def _is_too_deep(value: Any) -> bool:
    for _ in range(_MAX_ORJSON_DEPTH - MAX_DEPTH):
        value = [value]
    try:
        orjson.dumps(value)
    except TypeError:
        return True
    return False


def _rejected(reason: str) -> ValidationFailed:
    return ValidationFailed(reason, details=[{"field": "", "message": reason}])
