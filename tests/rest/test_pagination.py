"""Keyset pagination: the rows of a page, and the cursor of the next one."""

import base64
from datetime import UTC, datetime, timedelta, timezone
from uuid import UUID, uuid4

import pytest
from marshmallow import ValidationError, fields

from server import json
from server.errors import ValidationFailed
from server.fields import Schema
from server.rest.pagination import PageQuery, decode_cursor, encode_cursor, page_schema, paginate

MOMENT = datetime(2026, 11, 30, 10, 15, 30, 123456, UTC)


def encoded(value: object) -> str:
    return base64.urlsafe_b64encode(json.dumps(value)).decode().rstrip("=")


def rows(count: int) -> list[dict[str, int]]:
    return [{"id": number} for number in range(count)]


@pytest.mark.parametrize("count", [0, 1, 2])
def test_last_page_has_no_cursor(count: int) -> None:
    assert paginate(rows(count), 2, "id", list_name="things") == (rows(count), None)


@pytest.mark.parametrize("limit", [1, 2, 3])
def test_page_has_limit_rows_and_the_cursor_of_the_last_one(limit: int) -> None:
    page_rows, cursor = paginate(rows(limit + 1), limit, "id", list_name="things")
    assert page_rows == rows(limit)
    assert cursor is not None
    assert decode_cursor(cursor, int, list_name="things") == (limit - 1,)


def test_a_cursor_keeps_the_microseconds_of_a_time() -> None:
    # A time rounded to milliseconds would repeat or skip rows.
    id = uuid4()
    _, cursor = paginate([{"at": MOMENT, "id": id}] * 2, 1, "at", "id", list_name="things")
    assert decode_cursor(cursor, datetime, UUID, list_name="things") == (MOMENT, id)


def test_a_time_of_another_zone_is_the_same_moment_in_utc() -> None:
    elsewhere = MOMENT.astimezone(timezone(timedelta(hours=5)))
    [decoded] = decode_cursor(encode_cursor(elsewhere.isoformat(), list_name="things"), datetime, list_name="things")
    assert (decoded, decoded.tzinfo) == (MOMENT, UTC)


def test_no_cursor_is_the_first_page() -> None:
    assert decode_cursor(None, datetime, UUID, list_name="things") == (None, None)


@pytest.mark.parametrize("length", range(1, 13))
def test_cursor_of_any_length_can_be_decoded(length: int) -> None:
    name = "x" * length  # base64 pads one in three
    cursor = encode_cursor(name, list_name="things")
    assert "=" not in cursor
    assert decode_cursor(cursor, str, list_name="things") == (name,)


LARGEST = (1 << 63) - 1


def test_numbers_of_a_cursor_fit_a_bigint() -> None:
    for number in (LARGEST, -LARGEST, 0):
        assert decode_cursor(encoded(["things", str(number)]), int, list_name="things") == (number,)


BAD = {
    "empty": "",
    "no base64": "!!!!",
    "a letter too many": "aaaaa",
    "no base64 amid base64": "!!!!" + encoded(["things", "1"]),
    "not ASCII": "é",
    "no JSON": base64.urlsafe_b64encode(b"x").decode(),
    "no UTF-8": base64.urlsafe_b64encode(b"\xff\xfe").decode(),
    "an empty list": encoded([]),
    "no list": encoded({"0": "things", "1": "1"}),
    "a text": encoded("things"),
    "of another list": encoded(["others", "1"]),
    "a later list": encoded(["zzz", "1"]),
    "too few keys": encoded(["things"]),
    "too many keys": encoded(["things", "1", "2"]),
    "a number for a text": encoded(["things", 1]),
    "null": encoded(["things", None]),
    "a list for a text": encoded(["things", ["1"]]),
    "a word for a number": encoded(["things", "one"]),
    "beyond a bigint": encoded(["things", str(LARGEST + 1)]),
    "below a bigint": encoded(["things", str(-LARGEST - 1)]),
    "far beyond a bigint": encoded(["things", str(1 << 70)]),
    "5,000 digits": encoded(["things", "9" * 5000]),
}


@pytest.mark.parametrize("cursor", BAD.values(), ids=list(BAD))
def test_cursor_that_is_malformed_or_of_another_list_is_rejected(cursor: str) -> None:
    with pytest.raises(ValidationFailed) as refused:
        decode_cursor(cursor, int, list_name="things")
    assert refused.value.details == [{"field": "cursor", "message": "Cursor does not belong to this list."}]
    assert refused.value.__cause__ is None


BAD_TIMES = {
    "no time": "yesterday",
    "without a zone": "2026-11-30T10:15:30",
    "before the first year": "0001-01-01T00:00:00+14:00",
    "after the last year": "9999-12-31T23:59:59-14:00",
}


@pytest.mark.parametrize("time", BAD_TIMES.values(), ids=list(BAD_TIMES))
def test_cursor_with_an_invalid_time_is_rejected(time: str) -> None:
    with pytest.raises(ValidationFailed):
        decode_cursor(encoded(["things", time]), datetime, list_name="things")


def test_cursor_with_an_invalid_id_is_rejected() -> None:
    with pytest.raises(ValidationFailed):
        decode_cursor(encoded(["things", "1"]), UUID, list_name="things")


def test_page_has_twenty_items_by_default() -> None:
    assert PageQuery().load({}) == {"limit": 20, "cursor": None}
    for limit in ("1", "100"):
        assert PageQuery().load({"limit": limit})["limit"] == int(limit)
    for limit in ("0", "101", "-1"):
        with pytest.raises(ValidationError):
            PageQuery().load({"limit": limit})


def test_long_cursor_is_rejected_before_decoding() -> None:
    assert PageQuery().load({"cursor": "x" * 1000})["cursor"] == "x" * 1000
    with pytest.raises(ValidationError):
        PageQuery().load({"cursor": "x" * 1001})


class Thing(Schema):
    id = fields.Integer()


def test_the_document_names_each_kind_of_page_once() -> None:
    shape = page_schema(Thing)
    assert shape is page_schema(Thing)
    assert shape.__name__ == "ThingPage"
    assert set(shape().fields) == {"items", "next_cursor"}
    assert shape().fields["next_cursor"].allow_none
