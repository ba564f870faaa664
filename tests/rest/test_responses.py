"""Headers and problem bodies that all responses have in common."""

import asyncio
import io
import re
from collections.abc import AsyncIterator

import aiohttp
import orjson
import pytest

from server.errors import ERROR_CODES
from tests.actors import Actor
from tests.conftest import MakeServer
from tests.timeouts import WAIT_TIMEOUT_SECONDS


async def test_an_error_is_a_problem(alice: Actor) -> None:
    response = await alice.post("/projects", {"name": "", "colour": "red"})
    assert response.headers["Content-Type"].startswith("application/problem+json")
    assert response.status == 422
    problem = response.body
    assert problem["type"] == "about:blank"
    assert (problem["title"], problem["status"], problem["code"]) == ("Unprocessable Content", 422, "validation_failed")
    assert problem["error"] == problem["detail"]
    assert {detail["field"] for detail in problem["details"]} == {"name", "colour"}
    assert problem["requestId"] == response.headers["X-Request-Id"]


@pytest.mark.parametrize("path", ["/nowhere", "/api/v1/nowhere", "/api/v1/projects/", "/api/v1//projects"])
async def test_an_unknown_path_is_not_found(path: str, alice: Actor) -> None:
    async with alice.http.get(alice.base + path, headers={**alice.headers, "Accept": "text/html"}) as response:
        assert response.status == 404
        assert response.content_type == "application/problem+json"
        assert (await response.json())["code"] == "not_found"


async def test_wrong_method_gets_the_allowed_methods(alice: Actor) -> None:
    response = await alice.call("PUT", "/projects")
    assert (response.status, response.code) == (405, "method_not_allowed")
    assert {"GET", "POST"} <= set(response.headers["Allow"].split(", "))


async def test_well_formed_request_id_is_kept_and_any_other_replaced(alice: Actor) -> None:
    kept = await alice.get("/projects", headers={"X-Request-Id": "trace-1.2:3"})
    assert kept.headers["X-Request-Id"] == "trace-1.2:3"
    for malformed_id in ("", "a" * 129, "with space", 'quote"', "<script>"):
        replaced = await alice.get("/projects", headers={"X-Request-Id": malformed_id})
        assert re.fullmatch(r"[0-9a-f]{32}", replaced.headers["X-Request-Id"])


async def test_every_response_has_the_headers_of_a_json_api(alice: Actor, http: aiohttp.ClientSession) -> None:
    for path in ("/api/v1/projects", "/api/v1/nowhere", "/health", "/api/v1/projects/1"):
        response = await alice.get(path)
        assert response.headers["X-Content-Type-Options"] == "nosniff"
        assert response.headers["X-Frame-Options"] == "DENY"
        assert response.headers["Referrer-Policy"] == "no-referrer"
        assert "default-src 'none'" in response.headers["Content-Security-Policy"]
        assert response.headers["Cache-Control"] == "private, no-cache"
        assert "Server" not in response.headers


async def test_production_insists_on_tls(alice: Actor, make_server: MakeServer) -> None:
    there = alice.at(await make_server(app_env="production"))
    for path in ("/health", "/api/v1/projects", "/api/v1/nowhere"):
        assert int((await there.get(path)).headers["Strict-Transport-Security"].partition("=")[2]) >= 31536000
    assert "Strict-Transport-Security" not in (await alice.get("/health")).headers


READABLE = b"POST /api/v1/auth/login HTTP/1.1\r\nHost: x\r\n"


@pytest.mark.parametrize(
    ("head", "expected", "code"),
    [
        (b"GET /health?" + b"a" * 9000 + b" HTTP/1.1", 414, "uri_too_long"),
        (READABLE + b"X-Long: " + b"a" * 9000, 431, "header_fields_too_large"),
        (READABLE + b"a" * 9000 + b": name", 431, "header_fields_too_large"),
        (READABLE + b"\r\n".join(b"X-%d: 1" % number for number in range(200)), 431, "header_fields_too_large"),
        (READABLE + b"Content-Length: many", 400, "bad_request"),
        (READABLE + b"Expect: nonsense", 400, "bad_request"),
        (READABLE + b"no header", 400, "bad_request"),
        (b"BREW /pot HTTP/1.1", 400, "bad_request"),
        (b"GET /health HTTP/9.9", 400, "bad_request"),
        (b"\x16\x03\x01\x02\x00\x01\x00<html>", 400, "bad_request"),
    ],
)
async def test_malformed_request_gets_a_problem_like_any_other(
    head: bytes, expected: int, code: str, server: str
) -> None:
    reader, writer = await asyncio.open_connection("127.0.0.1", int(server.rpartition(":")[2]))
    writer.write(head + b"\r\nConnection: close\r\n\r\n")
    async with asyncio.timeout(WAIT_TIMEOUT_SECONDS):
        response_head, _, body = (await reader.read()).partition(b"\r\n\r\n")
    writer.close()
    status, *lines = response_head.decode().split("\r\n")
    headers = {name.lower(): value for name, value in (line.split(": ", 1) for line in lines)}
    assert f" {expected} " in status
    assert headers["content-type"].startswith("application/problem+json")
    assert headers["x-content-type-options"] == "nosniff"
    assert "server" not in headers
    problem = orjson.loads(body)
    assert (problem["status"], problem["code"]) == (expected, code)
    assert problem["requestId"] == headers["x-request-id"]


async def test_responses_with_tokens_forbid_caching(alice: Actor) -> None:
    response = await alice.post("/auth/refresh", {"refreshToken": alice.refresh_token})
    assert response.headers["Cache-Control"] == "no-store"


async def test_static_assets_are_immutable(alice: Actor) -> None:
    async with alice.http.get(f"{alice.base}/api-docs/static/swagger-ui.css") as response:
        assert "immutable" in response.headers["Cache-Control"]


def test_every_code_has_one_status_and_a_meaning() -> None:
    assert all(meaning and (status is None or 400 <= status < 600) for status, meaning in ERROR_CODES.values())


@pytest.mark.parametrize(
    ("body", "headers", "status", "code"),
    [
        (b"{", {}, 400, "bad_request"),
        (b"[]", {}, 422, "validation_failed"),
        (b"null", {}, 422, "validation_failed"),
        (b'"text"', {}, 422, "validation_failed"),
        (b'{"name": "x"}', {"Content-Type": "text/plain"}, 415, "unsupported_media_type"),
        (b'{"name": "x"}', {"Content-Type": "application/json; charset=nope"}, 415, "unsupported_media_type"),
        (b'{"name": "x"}', {"Content-Type": "application/json; charset=utf-16"}, 415, "unsupported_media_type"),
        (b"no gzip", {"Content-Encoding": "gzip"}, 400, "bad_request"),
        (b'{"name": "\xff"}', {}, 400, "bad_request"),
        (b"", {}, 422, "validation_failed"),  # no body means {}: the name is missing
        (b"", {"Content-Type": "text/plain"}, 422, "validation_failed"),
        (b"{" * 100_000, {}, 400, "bad_request"),
        (b"[" * 100_000 + b"]" * 100_000, {}, 400, "bad_request"),
        (b'{"name": ' + b"9" * 5_000 + b"}", {}, 422, "validation_failed"),
        (b'{"name": 1e400}', {}, 400, "bad_request"),
        (b'{"name": NaN}', {}, 400, "bad_request"),
        (b'{"name": "x", "name": "\\ud800"}', {}, 422, "validation_failed"),
        (b"[" * 300 + b"]" * 300, {}, 422, "validation_failed"),
        (b" " * (1 << 20) + b"{}", {}, 413, "too_large"),
    ],
)
async def test_invalid_body_gets_a_specific_error(
    body: bytes, headers: dict[str, str], status: int, code: str, alice: Actor
) -> None:
    request_headers = {"Content-Type": "application/json"} | headers
    response = await alice.call("POST", "/projects", headers=request_headers, data=io.BytesIO(body))
    assert (response.status, response.code) == (status, code), response
    assert (await alice.get("/projects"))["items"] == []


async def test_slow_body_does_not_use_up_the_deadline_of_the_stores(alice: Actor) -> None:
    """The body takes longer than the deadline of the stores, which is paused while the body arrives."""

    async def slow_body() -> AsyncIterator[bytes]:
        yield b'{"name": '
        await asyncio.sleep(2)
        yield b'"Engine"}'

    response = await alice.call("POST", "/projects", headers={"Content-Type": "application/json"}, data=slow_body())
    assert response.status == 201, response
