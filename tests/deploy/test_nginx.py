"""Test the real configuration of nginx in a real nginx, on other ports.

Two scripted upstreams check which requests it forwards; one test runs it in front of the product's own servers.
"""

import asyncio
import contextlib
import io
import os
import re
import shutil
import socket
import subprocess
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import aiohttp
import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer

from server.devstack.stack import free_port
from tests.actors import Actor
from tests.conftest import MakeActor, MakeServer
from tests.processes import ROOT
from tests.timeouts import PROCESS_TIMEOUT_SECONDS, WAIT_TIMEOUT_SECONDS

PROGRAM = shutil.which("nginx", path=os.environ["PATH"] + ":/usr/sbin")
needs_nginx = pytest.mark.skipif(PROGRAM is None, reason="nginx is missing: apt-get install nginx-light")
pytestmark = needs_nginx

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]
Nginx = Callable[..., Awaitable[str]]


def local_configuration(ports: tuple[int, int], listen: int, folder: Path) -> str:
    """Return the configuration with addresses and paths of this machine.

    It omits ``resolve``, because that needs Docker's DNS and a newer nginx than Debian's.
    """
    text = (ROOT / "scripts/deploy/nginx.conf").read_text()
    for name, port in zip(("server-1", "server-2"), ports, strict=True):
        text = text.replace(f"{name}:3000 resolve", f"127.0.0.1:{port}")
    text = text.replace("listen 3000", f"listen 127.0.0.1:{listen}")
    return text.replace(" /tmp/", f" {folder}/").replace("/dev/stdout", f"{folder}/log")


def nginx_command(conf: Path, *arguments: str) -> list[str]:
    assert PROGRAM is not None
    root = " user root;" if os.geteuid() == 0 else ""  # else its workers cannot enter the test's directory
    return [PROGRAM, "-e", "stderr", "-c", str(conf), "-g", f"daemon off;{root}", *arguments]


@pytest.fixture
async def nginx(tmp_path: Path) -> AsyncIterator[Nginx]:
    """Return ``await nginx(port, port)``, which starts nginx in front of two ports and returns its address.

    For None it takes a port that refuses connections. Such a port is bound to the end: a free one could be given to
    nginx itself, which would then be its own upstream.
    """
    running: list[asyncio.subprocess.Process] = []
    refusing: list[socket.socket] = []

    def refusing_port() -> int:
        refusing.append(socket.socket())
        refusing[-1].bind(("127.0.0.1", 0))
        port: int = refusing[-1].getsockname()[1]
        return port

    async def start(*ports: int | None) -> str:
        first, second = (refusing_port() if port is None else port for port in ports)
        listen = free_port()
        conf = tmp_path / "nginx.conf"
        conf.write_text(local_configuration((first, second), listen, tmp_path))
        running.append(await asyncio.create_subprocess_exec(*nginx_command(conf)))
        await wait_until_listening(listen)
        return f"http://127.0.0.1:{listen}"

    yield start
    for process in running:
        process.terminate()
        await process.wait()
    for bound in refusing:
        bound.close()


async def wait_until_listening(port: int) -> None:
    async with asyncio.timeout(PROCESS_TIMEOUT_SECONDS):
        while True:
            with contextlib.suppress(OSError):
                _, writer = await asyncio.open_connection("127.0.0.1", port)
                writer.close()
                return
            await asyncio.sleep(0.02)


class Upstream:
    """A scripted server that records its requests."""

    def __init__(self) -> None:
        self.requests: list[web.Request] = []
        self.answer: Handler = self.ok

    async def handle(self, request: web.Request) -> web.StreamResponse:
        self.requests.append(request)
        return await self.answer(request)

    async def ok(self, request: web.Request) -> web.StreamResponse:
        return web.json_response({"bytes": len(await request.read())})

    async def unavailable(self, _: web.Request) -> web.StreamResponse:
        body = {"status": 503, "code": "unavailable", "detail": "draining"}
        return web.json_response(body, status=503, content_type="application/problem+json")

    async def abort(self, request: web.Request) -> web.StreamResponse:
        assert request.transport is not None
        request.transport.abort()
        return web.Response()


@pytest.fixture
def upstreams() -> tuple[Upstream, Upstream]:
    return Upstream(), Upstream()


@pytest.fixture
async def proxy(nginx: Nginx, upstreams: tuple[Upstream, Upstream]) -> AsyncIterator[str]:
    """Start nginx in front of the two upstreams; return its address."""
    async with contextlib.AsyncExitStack() as stack:
        ports = []
        for upstream in upstreams:
            app = web.Application(client_max_size=16 << 20)
            app.router.add_route("*", "/{path:.*}", upstream.handle)
            server = await stack.enter_async_context(TestServer(app))
            ports.append(server.port)
        yield await nginx(*ports)


async def ask(http: aiohttp.ClientSession, method: str, url: str, **options: Any) -> tuple[int, Any, Mapping[str, str]]:
    async with http.request(method, url, **options) as answer:
        return answer.status, await answer.json(content_type=None), answer.headers


def test_nginx_accepts_its_configuration(tmp_path: Path) -> None:
    conf = tmp_path / "nginx.conf"
    conf.write_text(local_configuration((3001, 3002), 3003, tmp_path))
    result = subprocess.run(nginx_command(conf, "-t"), capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


def test_nginx_writes_to_tmp_only() -> None:
    """In docker-compose.yml the rest of its file system is read-only."""
    text = re.sub(r"#.*", "", (ROOT / "scripts/deploy/nginx.conf").read_text())
    settings = re.findall(r"^\s*(pid|\w+_temp_path|error_log|access_log)\s+([^\s;]+)", text, re.MULTILINE)
    assert {name for name, _ in settings} >= {"pid", "client_body_temp_path", "proxy_temp_path"}
    assert [path for _, path in settings if not path.startswith(("/tmp/", "/dev/stdout", "stderr"))] == []


async def test_both_servers_receive_requests(
    proxy: str, upstreams: tuple[Upstream, Upstream], http: aiohttp.ClientSession
) -> None:
    for _ in range(8):
        assert (await ask(http, "GET", f"{proxy}/api/v1/projects"))[0] == 200
    assert all(len(upstream.requests) >= 2 for upstream in upstreams)


@pytest.mark.parametrize("failure", ["unavailable", "abort"])
async def test_a_get_is_retried_on_the_other_server_when_one_drains_or_fails(
    proxy: str, upstreams: tuple[Upstream, Upstream], http: aiohttp.ClientSession, failure: str
) -> None:
    upstreams[0].answer = getattr(upstreams[0], failure)
    statuses = [(await ask(http, "GET", f"{proxy}/health"))[0] for _ in range(8)]
    assert statuses == [200] * 8
    assert upstreams[0].requests


async def test_a_post_is_never_sent_twice(
    proxy: str, upstreams: tuple[Upstream, Upstream], http: aiohttp.ClientSession
) -> None:
    for upstream in upstreams:
        upstream.answer = upstream.abort
    assert (await ask(http, "POST", f"{proxy}/api/v1/projects", json={}))[0] == 503
    assert sum(len(upstream.requests) for upstream in upstreams) == 1


async def test_a_post_goes_to_the_server_that_still_listens(
    nginx: Nginx, upstreams: tuple[Upstream, Upstream], http: aiohttp.ClientSession
) -> None:
    app = web.Application()
    app.router.add_route("*", "/{path:.*}", upstreams[0].handle)
    async with TestServer(app) as server:
        proxy = await nginx(None, server.port)
        for _ in range(4):
            assert (await ask(http, "POST", f"{proxy}/api/v1/projects", json={}))[0] == 200


async def test_the_client_gets_the_response_of_a_server_when_both_refuse(
    proxy: str, upstreams: tuple[Upstream, Upstream], http: aiohttp.ClientSession
) -> None:
    for upstream in upstreams:
        upstream.answer = upstream.unavailable
    for _ in range(5):
        status, body, _ = await ask(http, "GET", f"{proxy}/health/ready")
        assert (status, body["detail"]) == (503, "draining")


async def test_nginx_responds_with_a_problem_body_when_no_server_is_reachable(
    nginx: Nginx, http: aiohttp.ClientSession
) -> None:
    proxy = await nginx(None, None)
    status, body, headers = await ask(http, "GET", f"{proxy}/api/v1/projects", headers={"X-Request-Id": "mine-1"})
    assert status == body["status"] == 503
    assert (body["code"], body["type"], body["error"]) == ("unavailable", "about:blank", body["detail"])
    assert headers["Content-Type"] == "application/problem+json"
    assert headers["Retry-After"] == "2"
    assert headers["X-Request-Id"] == body["requestId"] == "mine-1"


async def test_the_largest_document_is_accepted_and_a_larger_body_is_refused(
    proxy: str, upstreams: tuple[Upstream, Upstream], http: aiohttp.ClientSession
) -> None:
    url = f"{proxy}/api/v1/documents/1/content"
    status, body, _ = await ask(http, "PUT", url, data=io.BytesIO(b"x" * (10 << 20)))
    assert (status, body["bytes"]) == (200, 10 << 20)
    status, body, headers = await ask(http, "PUT", url, data=io.BytesIO(b"x" * (12 << 20)))
    assert (status, body["status"], body["code"]) == (413, 413, "too_large")
    assert headers["Content-Type"] == "application/problem+json"
    assert "Retry-After" not in headers


@pytest.mark.parametrize(
    ("request_line", "status", "code"),
    [
        (b"GET / HTTP/1.1\r\nHost: a\r\nHost: b\r\n", 400, "bad_request"),
        (b"TRACE / HTTP/1.1\r\nHost: a\r\n", 405, "method_not_allowed"),
        (b"GET /" + b"x" * 40_000 + b" HTTP/1.1\r\nHost: a\r\n", 414, "uri_too_long"),
        (b"GET / HTTP/1.1\r\nHost: a\r\nX: " + b"x" * 40_000 + b"\r\n", 431, "header_fields_too_large"),
        (b"GET /.problem HTTP/1.1\r\nHost: a\r\n", 404, "not_found"),
        (b"POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: magic\r\n", 400, "bad_request"),
    ],
    ids=["two hosts", "method", "long path", "long header", "internal path", "encoding"],
)
async def test_an_error_of_nginx_itself_is_a_problem_body(
    proxy: str, request_line: bytes, status: int, code: str
) -> None:
    reader, writer = await asyncio.open_connection("127.0.0.1", urlsplit(proxy).port)
    writer.write(request_line + b"Connection: close\r\n\r\n")
    answer = (await reader.read()).decode()
    writer.close()
    assert answer.startswith(f"HTTP/1.1 {status} "), answer
    assert "Content-Type: application/problem+json" in answer
    assert f'"status":{status}' in answer
    assert f'"code":"{code}"' in answer


@pytest.mark.parametrize("sent", ["trace-1", None, "not sane\t{}"])
async def test_a_request_keeps_its_valid_id_and_else_gets_a_new_one(
    proxy: str, upstreams: tuple[Upstream, Upstream], http: aiohttp.ClientSession, sent: str | None
) -> None:
    await ask(http, "GET", f"{proxy}/api/v1/projects", headers={"X-Request-Id": sent} if sent else {})
    (received,) = (request for upstream in upstreams for request in upstream.requests)
    if sent == "trace-1":
        assert received.headers["X-Request-Id"] == "trace-1"
    else:
        assert re.fullmatch(r"[0-9a-f]{32}", received.headers["X-Request-Id"])


async def test_a_client_cannot_forge_its_address(
    proxy: str, upstreams: tuple[Upstream, Upstream], http: aiohttp.ClientSession
) -> None:
    await ask(http, "GET", f"{proxy}/health", headers={"X-Forwarded-For": "198.51.100.7"})
    (received,) = (request for upstream in upstreams for request in upstream.requests)
    assert received.headers.getall("X-Forwarded-For") == ["127.0.0.1"]
    assert received.headers["Host"] == urlsplit(proxy).netloc


async def test_an_artifact_is_streamed_to_the_client(
    proxy: str, upstreams: tuple[Upstream, Upstream], http: aiohttp.ClientSession
) -> None:
    first_arrived = asyncio.Event()

    async def in_two_parts(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse()
        await response.prepare(request)
        await response.write(b"first")
        async with asyncio.timeout(WAIT_TIMEOUT_SECONDS):
            await first_arrived.wait()
        await response.write(b"second")
        return response

    for upstream in upstreams:
        upstream.answer = in_two_parts
    async with http.get(f"{proxy}/api/v1/jobs/1/artifacts/export.zip") as answer:
        assert await answer.content.readany() == b"first"
        first_arrived.set()
        assert await answer.content.read() == b"second"


@pytest.mark.parametrize("path", ["/ws", "/yjs/0b8a"])
async def test_sockets_pass_with_their_subprotocol_and_large_frames(
    proxy: str, upstreams: tuple[Upstream, Upstream], http: aiohttp.ClientSession, path: str
) -> None:
    async def echo(request: web.Request) -> web.StreamResponse:
        socket = web.WebSocketResponse(protocols=["collab.v1"], max_msg_size=16 << 20)
        await socket.prepare(request)
        async for message in socket:
            await socket.send_bytes(message.data)
        return socket

    upstreams[0].answer, upstreams[1].answer = (
        echo,
        upstreams[1].unavailable,
    )  # a new socket is retried on the server that accepts it
    for _ in range(4):
        protocols = ("collab.v1", "bearer.token")
        async with http.ws_connect(proxy + path, protocols=protocols, max_msg_size=16 << 20) as socket:
            assert socket.protocol == "collab.v1"
            await socket.send_bytes(b"x" * (10 << 20))
            assert len((await socket.receive()).data) == 10 << 20


async def test_the_product_works_behind_nginx(
    nginx: Nginx, make_server: MakeServer, make_actor: MakeActor, tmp_path: Path
) -> None:
    servers = [await make_server() for _ in range(2)]
    proxy = await nginx(*(urlsplit(server).port for server in servers))
    ada: Actor = await make_actor("Ada", proxy)
    bob: Actor = await make_actor("Bob", proxy)
    workspace = await ada.make_workspace(None, bob)
    # nginx alternates between the two servers, so the two sockets are on different servers.
    receiver, sender = await bob.connect(workspace), await ada.connect(workspace)
    await receiver.assert_push("USER_JOIN", userId=ada.id)
    await sender.push("file:change", workspaceId=workspace, path="main.py", change="+1")
    await receiver.assert_push("FILE_CHANGE", path="main.py")
    assert (tmp_path / "log").read_text() == ""  # no entries: every request was served at once
