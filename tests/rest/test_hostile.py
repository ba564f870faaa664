"""Hostile values in every field of every body, query and header never cause a 5xx."""

import asyncio
import json
import time
from types import NoneType
from typing import Any
from urllib.parse import quote
from uuid import uuid4

import pytest
from aiohttp import web
from marshmallow import fields, validate

from server import metrics
from server.fields import Name, Text
from server.rest.marks import is_public
from tests.actors import PASSWORD, Actor
from tests.conftest import MakeActor
from tests.processes import Processes
from tests.test_roles import fill_path, resource_ids_of, route_id, valid_body
from tests.test_roles import routes as private_routes
from tests.timeouts import WAIT_TIMEOUT_SECONDS

# In JSON syntax, because an encoder would not write some of them.
VALUES = {
    "nul": r'"a\u0000b"',
    "lone surrogate": r'"a\ud800b"',
    "null": "null",
    "true": "true",
    "zero": "0",
    "negative": "-1",
    "fraction": "1.5",
    "beyond a bigint": "9223372036854775808",
    "5,000 digits": "9" * 5000,
    "beyond a double": "1e400",
    "not a number": "NaN",
    "empty text": '""',
    "blank": '"   "',
    "100,000 characters": '"' + "a" * 100_000 + '"',
    "list": "[]",
    "nested lists": "[[[[1]]]]",
    "100,000 deep": "[" * 100_000 + "]" * 100_000,
    "object": "{}",
    "Mongo operator": '{"$gt": ""}',
    "dollar key": '{"$where": "sleep(1000)", "a.b": 1, "": 2}',
    "prototype": '{"__proto__": {"admin": true}}',
    "SQL": '"\'; DROP TABLE users; --"',
    "format": '"%s%n{0}{{}}$1"',
    "template": '"${jndi:ldap://x}<script>alert(1)</script>"',
    "right to left": '"\u202eabc\u2066"',
    "emoji": '"👩‍👩‍👧‍👦"',
    "combining": '"' + "e" + "\u0301" * 50 + '"',
    "newlines": r'"a\r\nSet-Cookie: x=1\r\n\r\nb"',
    "path": '"../../../../etc/passwd"',
    "uuid with braces": '"{00000000-0000-4000-8000-000000000000}"',
    "far time": '"9999-12-31T23:59:59.999999+14:00"',
    "early time": '"0001-01-01T00:00:00-14:00"',
    "year 0": '"0000-00-00"',
}


def schemas(route: web.RouteDef, location: str) -> list[Any]:
    return [
        declared["schema"] for declared in getattr(route.handler, "__schemas__", ()) if declared["location"] == location
    ]


ALL = [*private_routes()]
WITH_BODY = [route for route in ALL if schemas(route, "json")]
WITH_QUERY = [route for route in ALL if schemas(route, "querystring")]


async def send(actor: Actor, method: str, path: str, raw: str) -> int:
    headers = actor.headers | {"Content-Type": "application/json"}
    async with actor.http.request(method, actor.base + path, data=raw.encode(), headers=headers) as response:
        await response.read()
        return response.status


def is_text(schema: Any, name: str) -> bool:
    """Return whether a field is free text: only its length, or a visible character, is required."""
    field = next(field for key, field in schema.fields.items() if (field.data_key or key) == name)
    limits = (validate.Length, NoneType)
    return type(field) in (fields.String, Text, Name) and isinstance(field.validate, limits)


async def send_bodies(actor: Actor, route: web.RouteDef, path: str, ids: dict[str, str]) -> None:
    """Send every value in every field of a body that is else valid; free text accepts some of them."""
    for schema in schemas(route, "json"):
        names = [field.data_key or name for name, field in schema.fields.items()]
        right = await send(actor, route.method, path, json.dumps(fresh(route, ids)))
        for name in [*names, "unknownField"]:
            statuses = set()
            for kind, value in VALUES.items():
                raw = json.dumps({**fresh(route, ids), name: "@@"}).replace('"@@"', value)
                status = await send(actor, route.method, path, raw)
                assert status < 500, (route_id(route), name, kind)
                statuses.add(status)
                if status in ENDED and not is_public(route.handler):
                    await actor.log_in()
            if name in names and is_text(schema, name):
                assert right in statuses, (route_id(route), name, right, statuses)


ENDED = (204, 401)  # logged out, or rejected for a wrong password


def fresh(route: web.RouteDef, ids: dict[str, str]) -> dict[str, Any]:
    """Return a valid body that can be sent repeatedly."""
    body, word = valid_body(route, ids), uuid4().hex
    unique = {"path": f"{word}.py", "email": f"{word}@example.org"}
    return body | {name: value for name, value in unique.items() if name in body}


@pytest.mark.parametrize("route", WITH_BODY, ids=route_id)
async def test_body_values_never_cause_a_server_error(route: web.RouteDef, server: str, make_actor: MakeActor) -> None:
    actor = await make_actor("Mallory", server)
    actor.password = "Babbage1791"  # not the example in the OpenAPI document, which would delete the account
    await actor.post("/auth/password", {"currentPassword": PASSWORD, "newPassword": actor.password})
    ids = await resource_ids_of(actor)
    await send_bodies(actor, route, fill_path(route.path, ids), ids)
    await actor.log_in()
    assert (await actor.get("/projects")).status == 200


@pytest.mark.parametrize("path", ["register", "login", "refresh"])
async def test_body_values_without_a_token_never_cause_a_server_error(path: str, server: str, alice: Actor) -> None:
    from server.app import API

    guest = Actor(alice.http, server, "Nobody")
    route = next(route for table in API for route in table if str(getattr(route, "path", "")).endswith(f"/auth/{path}"))
    assert isinstance(route, web.RouteDef)
    assert is_public(route.handler)
    await send_bodies(guest, route, route.path, {})


@pytest.mark.parametrize("route", WITH_QUERY, ids=route_id)
async def test_query_values_never_cause_a_server_error(route: web.RouteDef, server: str, make_actor: MakeActor) -> None:
    actor = await make_actor("Mallory", server)
    path = fill_path(route.path, await resource_ids_of(actor))
    values = [json.loads(value) for value in VALUES.values() if value.startswith('"') and "ud800" not in value]
    values = [quote(value[:4000]) for value in values] + ["%00", "%ED%A0%80", "%FF%FE", "-1", "1e9", "9" * 400, "True"]
    for schema in schemas(route, "querystring"):
        for name, field in schema.fields.items():
            for value in values:
                status = await send(actor, "GET", f"{path}?{field.data_key or name}={value}", "")
                assert status < 500, (route_id(route), name, value[:80])


HEADERS = [
    ("If-Match", '"99999999999999999999999-owner"'),
    ("If-Match", "garbage"),
    ("If-Match", '"1-owner", W/"2"'),
    ("If-None-Match", '"' + "a" * 4000),
    ("If-None-Match", ',,,"",'),
    ("Authorization", "Bearer"),
    ("Authorization", "Bearer a.b.c"),
    ("Authorization", "Basic YTpi"),
    ("Authorization", "Bearer " + "a" * 7000),
    ("Accept", "text/html"),
    ("Accept-Encoding", "nope;q=2"),
    ("Content-Length", "0"),
    ("User-Agent", "\u00e9\u00ff" * 600),
    ("X-Forwarded-For", "1.2.3.4, , not an address, ::1"),
    ("Cookie", "a" * 6000),
    ("Range", "bytes=-1-"),
    ("Expect", "nonsense"),
    ("Origin", "null"),
    ("Host", ""),
]


@pytest.mark.parametrize(("name", "value"), HEADERS)
async def test_header_values_never_cause_a_server_error(name: str, value: str, alice: Actor) -> None:
    project = await alice.make_project()
    for method, path in (("GET", f"/projects/{project}"), ("PATCH", f"/projects/{project}"), ("GET", "/health")):
        response = await alice.call(method, path, headers={name: value})
        assert response.status < 500, response


async def raw_answer(port: int, *parts: bytes, pause: float = 0) -> tuple[bytes, float]:
    """Return a server's response to these bytes, and the seconds until it responded or closed."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    started = time.monotonic()
    trickle = asyncio.create_task(send_slowly(writer, parts, pause))
    try:
        async with asyncio.timeout(WAIT_TIMEOUT_SECONDS):
            response = await reader.read(65536)
        return response, time.monotonic() - started
    except ConnectionError:
        return b"", time.monotonic() - started
    finally:
        trickle.cancel()
        writer.close()


async def send_slowly(writer: asyncio.StreamWriter, parts: tuple[bytes, ...], pause: float) -> None:
    try:
        while True:
            for part in parts:
                writer.write(part)
                await writer.drain()
                await asyncio.sleep(pause)
            if not pause:
                return
            parts = parts[-1:]  # repeat the last part
    except ConnectionError:
        return


async def test_slow_headers_and_bodies_time_out_and_malformed_requests_get_no_html(processes: Processes) -> None:
    port = int(processes.server().base.rpartition(":")[2])
    head = b"POST /api/v1/auth/login HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
    headers, body, chunks, silence, garbage, large = await asyncio.gather(
        raw_answer(port, b"GET /health HTTP/1.1\r\n", b"X-Slow: 1\r\n", pause=0.5),
        raw_answer(port, head + b"Content-Length: 1000\r\n\r\n", b" ", pause=0.5),
        raw_answer(port, head + b"Transfer-Encoding: chunked\r\n\r\n", b"1\r\n \r\n", pause=0.5),
        raw_answer(port),
        raw_answer(port, b"\x16\x03\x01\x02\x00\x01\x00<html>\r\n\r\n"),
        raw_answer(port, head + b"Content-Length: 104857600\r\n\r\n", b" " * 65536, pause=0.001),
    )
    assert headers[0] == silence[0] == b""
    for _, seconds in (headers, body, chunks, silence):
        assert seconds > 8
    for response, _ in (body, chunks):
        assert response.startswith(b"HTTP/1.1 400 ")
        assert b"Request body exceeds the timeout of 10 seconds" in response
    assert b" 400 Bad Request" in garbage[0]
    assert b"text/html" not in garbage[0]
    assert large[0].startswith(b"HTTP/1.1 413 ")


async def test_client_that_disconnects_during_the_body_causes_no_server_error(server: str) -> None:
    def count_server_errors() -> float:
        samples = [sample for metric in metrics.REQUEST_DURATION.collect() for sample in metric.samples]
        counts = [sample for sample in samples if sample.name.endswith("_count")]
        return sum(sample.value for sample in counts if sample.labels["status"] == "500")

    def count_rejected() -> float:
        return metrics.REQUEST_DURATION.labels("POST", "/api/v1/auth/login", "400")._sum.get()

    errors_before, rejected_before = count_server_errors(), count_rejected()
    head = b"POST /api/v1/auth/login HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
    for body in (
        b"Content-Length: 1000\r\n\r\n",
        b'Content-Length: 1000\r\n\r\n{"em',
        b"Transfer-Encoding: chunked\r\n\r\nzz\r\n",
    ):
        _, writer = await asyncio.open_connection("127.0.0.1", int(server.rpartition(":")[2]))
        writer.write(head + body)
        await writer.drain()
        await asyncio.sleep(0.1)
        writer.close()
    async with asyncio.timeout(WAIT_TIMEOUT_SECONDS):
        while count_rejected() == rejected_before:
            await asyncio.sleep(0.05)
    assert count_server_errors() == errors_before
