"""JSON, in and out, for every door: fast (orjson) and strict about hostile input."""

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
MAX_SEARCHED_BYTES = 64 << 10  # of a text in which the place of a bad integer is looked for
DEEPEST = 200  # levels of what is taken, which is shown inside of something
_WRITABLE = 254  # levels that orjson writes
_ZEROS = bytes.maketrans(b"123456789", b"0" * 9)
_LONG_INTEGER = b"0" * 19  # what has fewer digits has 64 bits
_BEYOND = object()
_NUL = re.compile(rb"(?<!\\)(?:\\\\)*\\u0000")  # only an escape can bring one


class IntegerOutOfRangeError(ValidationFailed):
    """``value`` is the parsed text with a float in the integer's place; None where orjson knows no such float."""

    def __init__(self, field: str, value: Any) -> None:
        super().__init__(INTEGER_MESSAGE, details=[{"field": field, "message": f"{INTEGER_MESSAGE}."}])
        self.value = value


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
        ValidationFailed: it is, but nested too deep, or with NUL characters or lone surrogates, which no store
            could keep, or with an integer beyond 64 bits (``IntegerOutOfRangeError``).
    """
    try:
        value = orjson.loads(raw)
    except orjson.JSONDecodeError as error:
        _check_integers(raw, None)
        if not _is_utf8(raw):
            raise BadRequest("JSON must be UTF-8") from None
        if "surrogate" in str(error):
            raise _refused(SURROGATE_MESSAGE) from None
        raise BadRequest(f"Malformed JSON: {error}") from None
    # Both are looked for in C: a walk of ours would keep the loop for long, and could not go as deep.
    text = raw.encode("utf-8", "replace") if isinstance(raw, str) else raw
    if text.count(b"[") + text.count(b"{") > DEEPEST and _is_too_deep(value):
        raise _refused(f"JSON may be nested {DEEPEST} levels deep")
    if _NUL.search(text):
        raise _refused(NUL_MESSAGE)
    _check_integers(text, value)
    return value


def _check_integers(raw: bytes | str, value: Any) -> None:
    """orjson makes floats of integers that it cannot hold. The standard library does not, but takes longer."""
    text = raw.encode("utf-8", "replace") if isinstance(raw, str) else raw
    if _LONG_INTEGER not in text.translate(_ZEROS):
        return
    beyond: list[object] = []

    def integer(digits: str) -> object:
        if len(digits) < len(_LONG_INTEGER) or (len(digits) <= 20 and MIN_INTEGER <= int(digits) <= MAX_INTEGER):
            return 0
        beyond.append(_BEYOND)
        return _BEYOND

    try:
        parsed = standard.loads(text, parse_int=integer)
        place = _place(parsed) if beyond and len(text) <= MAX_SEARCHED_BYTES else None
    except (ValueError, RecursionError):  # then it is no JSON for orjson either
        return
    if beyond:
        raise IntegerOutOfRangeError(place or "", value)


def _place(value: Any) -> str | None:
    """The dotted path to the first integer beyond 64 bits; None where there is none in here."""
    if value is _BEYOND:
        return ""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, each in inner:
        if (place := _place(each)) is not None:
            return f"{key}.{place}".rstrip(".")[:200]
    return None


def _is_utf8(raw: bytes | str) -> bool:
    if isinstance(raw, bytes):
        try:
            raw.decode()
        except UnicodeDecodeError:
            return False
    return True


def timestamp(moment: datetime) -> str:
    utc = moment if moment.tzinfo is UTC else moment.astimezone(UTC)
    text = orjson.dumps(utc).decode()  # in a sixth of isoformat's time; without a fraction where that is 0
    return f"{text[1:20]}{text[20:24] if utc.microsecond else '.000'}Z"


def _default(value: Any) -> str:
    if isinstance(value, datetime):
        return timestamp(value)
    if isinstance(value, UUID):  # asyncpg's subclass; orjson knows the plain class only
        return str(value)
    raise TypeError(f"not serialisable: {type(value).__name__}")


def _is_too_deep(value: Any) -> bool:
    for _ in range(_WRITABLE - DEEPEST):
        value = [value]
    try:
        orjson.dumps(value)
    except TypeError:
        return True
    return False


def _refused(why: str) -> ValidationFailed:
    return ValidationFailed(why, details=[{"field": "", "message": why}])
