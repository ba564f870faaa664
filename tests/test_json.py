"""The validation of JSON from clients, and its low cost."""

import json as standard
import time
from collections.abc import Callable
from datetime import UTC, datetime, timedelta, timezone
from typing import Any

import pytest

from server import fields, json
from server.auth.schemas import ProfileChange, Register
from server.errors import BadRequest, ServiceError, ValidationFailed
from server.projects.schemas import NewProject

QUICK_SECONDS = 2.5  # of processor time; a check takes a tenth of it


def nested(levels: int, inner: str = "") -> str:
    return "[" * levels + inner + "]" * levels


def project(settings: str) -> dict[str, Any]:
    return fields.load(NewProject(), json.loads(f'{{"name": "x", "settings": {settings}}}'))


@pytest.mark.parametrize("levels", [201, 254, 255, 600, 1000])
@pytest.mark.parametrize("inner", ["", r'"\u0000"', '{"a": 1}'])
def test_json_that_is_nested_too_deep_is_rejected(levels: int, inner: str) -> None:
    with pytest.raises(ValidationFailed) as rejected:
        json.loads(nested(levels, inner))
    assert "200 levels" in rejected.value.details[0]["message"]


def test_accepted_json_can_be_nested_in_a_page() -> None:
    settings = project(f'{{"deep": {nested(198)}}}')["settings"]
    assert json.dumps({"items": [{"settings": settings}]})
    brackets = json.loads('"' + "[" * 1000 + '"')
    assert brackets == "[" * 1000


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (r'{"a": ["x\u0000"]}', json.NUL_MESSAGE),
        (r'{"\u0000": 1}', json.NUL_MESSAGE),
        (r'"\\\u0000"', json.NUL_MESSAGE),
        (r'["\ud800"]', json.SURROGATE_MESSAGE),
    ],
)
def test_text_that_no_store_can_keep_is_rejected_with_details(text: str, message: str) -> None:
    with pytest.raises(ValidationFailed) as rejected:
        json.loads(text)
    assert [detail["message"] for detail in rejected.value.details] == [message]


BEYOND = str(1 << 63)


@pytest.mark.parametrize(
    ("text", "field"),
    [
        (BEYOND, ""),
        (f"-{(1 << 63) + 1}", ""),
        ("9" * 19, ""),
        ("9" * 25, ""),
        ("-" + "9" * 400, ""),  # not even a double
        (f'{{"a": {{"b": [1, {BEYOND}]}}}}', "a.b.1"),
        (f'{{"a": "{BEYOND}", "b": {BEYOND}}}', "b"),
        (f'{{"\\"": {{"": {BEYOND}}}}}', '"'),
        (f'["{BEYOND}, \\"", {BEYOND}]', "1"),
        (f'{{"a": {BEYOND}, "a": 1}}', ""),
    ],
)
def test_integer_beyond_64_bits_is_rejected_with_its_path(text: str, field: str) -> None:
    for raw in (text, text.encode(), f" {text}\n"):
        with pytest.raises(ValidationFailed) as rejected:
            json.loads(raw)
        assert rejected.value.details == [{"field": field, "message": f"{json.INTEGER_MESSAGE}."}]


@pytest.mark.parametrize(
    "text",
    [
        str((1 << 63) - 1),
        str(-(1 << 63)),
        "[0, -0, 10000000000000000]",
        "0.1000000000000000055511151231257827",
        "1234567890123456789012345.0",
        "12345678901234567890e1",
        "1e22",
        f'["{BEYOND}", "\\"{BEYOND}"]',
        f'{{"{BEYOND}": 1}}',
    ],
)
def test_other_numbers_and_digits_in_text_are_kept(text: str) -> None:
    assert json.loads(text) == standard.loads(text)


def test_a_backslash_before_u0000_is_text() -> None:
    assert json.loads(r'"\\u0000"') == r"\u0000"


def test_json_size_counts_numbers_written_out_in_full() -> None:
    assert project('{"planck": 6.62607015e-34, "avogadro": 6.02e23}')
    for number in ("1e308", "1e-300"):
        with pytest.raises(ValidationFailed):
            project(f'{{"a": [{",".join([number] * 100)}]}}')


def many_unknown_fields() -> None:
    fields.load(NewProject(), json.loads("{" + ",".join(f'"k{n}": 1' for n in range(105_000)) + "}"))


HOSTILE: dict[str, Callable[[], object]] = {
    "unknown fields": many_unknown_fields,
    "a long address": lambda: fields.load(Register(), {"email": "a@" + "b." * 500_000}),
    "a long picture": lambda: fields.load(ProfileChange(), {"avatarUrl": "http://a." + "a-" * 500_000}),
    "a long password": lambda: fields.load(Register(), {"password": "x" * 1_000_000}),
    "brackets": lambda: json.loads(",".join(["[1]"] * 250_000).join("[]") + "x"),
    "integers": lambda: json.loads("[" + "1," * 524_000 + f"{BEYOND}]"),
    "lists before a long integer": lambda: json.loads("[" + "{}," * 20_000 + f"{BEYOND}]"),
    "digits": lambda: json.loads("[" + "123456789012345678," * 55_000 + "1}"),
    "escapes": lambda: json.loads('"' + "\\\\" * 500_000 + '\\u0000"'),
}


@pytest.mark.parametrize("body", HOSTILE)
def test_rejection_of_a_hostile_body_is_quick_and_short(body: str) -> None:
    started = time.thread_time()
    with pytest.raises((ValidationFailed, BadRequest)) as rejected:
        HOSTILE[body]()
    assert time.thread_time() - started < QUICK_SECONDS
    error: ServiceError = rejected.value
    assert len(error.details) <= fields.MAX_VALIDATION_ERRORS


@pytest.mark.parametrize(
    ("moment", "formatted"),
    [
        (datetime(2026, 1, 2, 3, 4, 5, 678999, UTC), "2026-01-02T03:04:05.678Z"),
        (datetime(2026, 1, 2, 3, 4, 5, 0, UTC), "2026-01-02T03:04:05.000Z"),
        (datetime(2026, 1, 2, 3, 4, 5, 999, UTC), "2026-01-02T03:04:05.000Z"),
        (datetime(2026, 1, 2, 3, 4, 5, 7000, timezone(timedelta(hours=2))), "2026-01-02T01:04:05.007Z"),
        (datetime(1, 1, 1, tzinfo=UTC), "0001-01-01T00:00:00.000Z"),
    ],
)
def test_times_are_utc_with_milliseconds(moment: datetime, formatted: str) -> None:
    assert json.format_timestamp(moment) == formatted
    assert json.dumps([moment]) == f'["{formatted}"]'.encode()
