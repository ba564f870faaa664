"""Measure the socket against a baseline in the same run: a bare aiohttp handler with the same broadcast.

    .venv/bin/python scripts/bench/realtime.py [--seconds 5] [--only fanout,latency,rooms,connect,memory]

Starts its own stores and one server process with the default settings, except for the limits. Every connection belongs
to another user. The clients count the deliveries. On a busy machine, the rate per second of the server's processor time
is more reliable. The latencies in ``rooms`` come from writers who never pause, so nearly all of it is queueing.
"""

import argparse
import asyncio
import base64
import contextlib
import os
import re
import resource
import secrets
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import orjson
import psycopg
import uvloop
from aiohttp import web

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from server import migrations  # noqa: E402
from server.auth import tokens  # noqa: E402
from server.devstack.stack import Stack  # noqa: E402
from server.realtime.protocol import websocket_frame  # noqa: E402

USERS = 6100
READERS = 500
ROOMS, WRITERS = 100, 5
MAX_IN_FLIGHT = 8  # messages in flight in the busy room
IDLE_CONNECTIONS = (2000, 6000)
PAYLOAD = {"path": "src/engine.py", "change": {"insert": "x" * 40, "at": 1234}}
WELCOME = {"event": "welcome", "data": {"connectionId": "0" * 32, "userId": "0" * 36, "userName": "Somebody"}}


class Client(asyncio.Protocol):
    """A raw socket that passes its frames to ``on_frame``, or only counts bytes without it."""

    def __init__(self, token: str, on_frame: Callable[[bytes], None] | None = None) -> None:
        self.token = token
        self.on_frame = on_frame
        self.bytes = 0
        self.opened: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._frames: asyncio.Queue[bytes] = asyncio.Queue()
        self._buffer = b""
        self._upgraded = False

    def connection_made(self, transport: Any) -> None:
        self.transport = transport
        key = base64.b64encode(os.urandom(16)).decode()
        transport.write(
            "GET /ws HTTP/1.1\r\nHost: localhost\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n"
            "Sec-WebSocket-Version: 13\r\n"
            f"Sec-WebSocket-Key: {key}\r\nAuthorization: Bearer {self.token}\r\n\r\n".encode()
        )

    def data_received(self, data: bytes) -> None:
        if self._upgraded and self.on_frame is None:
            self.bytes += len(data)
            return
        self._buffer += data
        if not self._upgraded:
            head, separator, rest = self._buffer.partition(b"\r\n\r\n")
            if not separator:
                return
            if b" 101 " not in head.split(b"\r\n")[0]:
                raise SystemExit(head.decode())
            self._upgraded, self._buffer = True, rest
        self._parse()

    def _parse(self) -> None:
        buffer, position = self._buffer, 0
        while len(buffer) - position >= 2:
            size, head = buffer[position + 1], 2
            if size == 126:
                size, head = int.from_bytes(buffer[position + 2 : position + 4], "big"), 4
            elif size == 127:
                size, head = int.from_bytes(buffer[position + 2 : position + 10], "big"), 10
            if len(buffer) - position < head + size or (size == 0 and len(buffer) - position < head):
                break
            payload = buffer[position + head : position + head + size]
            position += head + size
            if not self.opened.done():
                self.opened.set_result(None)
            elif self.on_frame is not None:
                self.on_frame(payload)
            else:
                self._frames.put_nowait(payload)
        self._buffer = buffer[position:]

    def send(self, event: str, data: Any, *, id: int) -> None:
        payload = orjson.dumps({"event": event, "data": data, "id": id})
        size = len(payload)
        head = bytes([0x81, 0x80 | size]) if size < 126 else b"\x81\xfe" + size.to_bytes(2, "big")
        self.transport.write(head + b"\0\0\0\0" + payload)  # masked with zeros


class Target:
    """A server under test: its address, the tokens of its users, and its use of processor and memory."""

    def __init__(self, name: str, port: int, pid: int, tokens: list[str], rooms: list[str]) -> None:
        self.name, self.port, self.pid, self.tokens, self.rooms = name, port, pid, tokens, rooms

    async def connect(self, number: int = 0, on_frame: Callable[[bytes], None] | None = None) -> Client:
        token = self.tokens[number % len(self.tokens)]
        loop = asyncio.get_running_loop()
        _, client = await loop.create_connection(lambda: Client(token, on_frame or ignore), "127.0.0.1", self.port)
        await client.opened
        return client

    async def join(self, room: int, number: int = 0, on_frame: Callable[[bytes], None] | None = None) -> Client:
        joined = asyncio.get_running_loop().create_future()

        def wait(frame: bytes) -> None:
            if b'"ack"' in frame[:20] and not joined.done():
                joined.set_result(None)

        client = await self.connect(number, wait)
        client.send("join:workspace", {"workspaceId": self.rooms[room]}, id=1)
        await joined
        client.on_frame = on_frame
        return client

    def cpu(self) -> float:
        fields = Path(f"/proc/{self.pid}/stat").read_text().rsplit(")", 1)[1].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def memory(self) -> int:
        return int(Path(f"/proc/{self.pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def ignore(_: bytes) -> None:
    return None


def change_payload(target: Target, room: int) -> dict[str, Any]:
    return {"workspaceId": target.rooms[room], **PAYLOAD}


async def fanout(target: Target, seconds: float) -> dict[str, float]:
    """Measure the fan-out to READERS readers; ``MAX_IN_FLIGHT`` writers take turns as fast as the room delivers."""
    sizes: list[int] = []
    readers = [await target.join(0, number) for number in range(READERS - 1)]
    sampled = await target.join(0, 1, lambda frame: sizes.append(len(websocket_frame(frame))))
    sent = 0
    writers = [await target.join(0, READERS + number, ignore) for number in range(MAX_IN_FLIGHT)]
    await asyncio.sleep(1)
    sizes.clear()
    received_before, started, cpu_before = sum(reader.bytes for reader in readers), time.perf_counter(), target.cpu()
    while time.perf_counter() - started < seconds:
        while sent < len(sizes) + MAX_IN_FLIGHT:
            writers[sent % MAX_IN_FLIGHT].send("file:change", change_payload(target, 0), id=sent)
            sent += 1
        await asyncio.sleep(0)
    elapsed, cpu_used = time.perf_counter() - started, target.cpu() - cpu_before
    received = sum(reader.bytes for reader in readers) - received_before + sum(sizes)
    deliveries = received / statistics.mean(sizes)
    await close([*readers, sampled, *writers])
    return {"deliveries/s": deliveries / elapsed, "deliveries/cpu s": deliveries / cpu_used}


async def latency(target: Target, seconds: float) -> dict[str, float]:
    """Measure the latency of 5,000 deliveries a second to READERS readers.

    It is the time from the writer's send to the frame at every twentieth reader.
    """
    times: list[float] = []
    sent_at = 0.0

    def note(_: bytes) -> None:
        times.append(time.perf_counter() - sent_at)

    readers = [await target.join(0, number, None if number % 20 else note) for number in range(READERS)]
    writer = await target.join(0, READERS, ignore)
    await asyncio.sleep(1)
    times.clear()
    for number in range(int(seconds * 10)):
        sent_at = time.perf_counter()
        writer.send("file:change", change_payload(target, 0), id=number)
        await asyncio.sleep(max(0.0, sent_at + READERS / 5000 - time.perf_counter()))
    await close([*readers, writer])
    return percentiles(times)


def percentiles(times: list[float]) -> dict[str, float]:
    times.sort()
    return {"p50 ms": times[len(times) // 2] * 1000, "p99 ms": times[len(times) * 99 // 100] * 1000}


async def rooms(target: Target, seconds: float) -> dict[str, float]:
    """Measure ROOMS rooms of WRITERS members who all write, each one message at a time.

    Every tenth room also measures the latency.
    """
    counts = {"deliveries": 0, "messages": 0}
    times: list[float] = []
    writers: list[Client] = []
    running = True

    def stamped(room: int) -> dict[str, Any]:
        return {**change_payload(target, room), "change": {"insert": "x" * 40, "sent": time.perf_counter()}}

    def member(room: int) -> Callable[[bytes], None]:
        def receive(frame: bytes) -> None:
            if b'"ack"' in frame[:20]:
                counts["messages"] += 1
                if running:
                    clients[0].send("file:change", stamped(room), id=1)
            else:
                counts["deliveries"] += 1
                if room % 10 == 0 and b'"sent":' in frame:
                    times.append(time.perf_counter() - float(frame.partition(b'"sent":')[2].partition(b"}")[0]))

        clients: list[Client] = []
        receive.clients = clients  # type: ignore[attr-defined]
        return receive

    for room in range(ROOMS):
        for number in range(WRITERS):
            receive = member(room)
            client = await target.join(room, room * WRITERS + number, receive)
            receive.clients.append(client)  # type: ignore[attr-defined]
            writers.append(client)
    await asyncio.sleep(1)
    counts.update(deliveries=0, messages=0)
    times.clear()
    started, cpu_before = time.perf_counter(), target.cpu()
    for number, client in enumerate(writers):
        client.send("file:change", stamped(number // WRITERS), id=1)
    await asyncio.sleep(seconds)
    elapsed, cpu_used = time.perf_counter() - started, target.cpu() - cpu_before
    counted, waits = dict(counts), percentiles(times)
    running = False
    await close(writers)
    return {
        "messages/s": counted["messages"] / elapsed,
        "deliveries/s": counted["deliveries"] / elapsed,
        "deliveries/cpu s": counted["deliveries"] / cpu_used,
        **waits,
    }


async def connect(target: Target, _: float) -> dict[str, float]:
    """Measure authenticated connections, 32 at a time, until each has received its welcome."""
    count, slots = 3000, asyncio.Semaphore(32)

    async def one(number: int) -> Client:
        async with slots:
            return await target.connect(number)

    started, cpu_before = time.perf_counter(), target.cpu()
    clients = await asyncio.gather(*map(one, range(count)))
    elapsed, cpu_used = time.perf_counter() - started, target.cpu() - cpu_before
    await close(clients)
    return {"connections/s": count / elapsed, "connections/cpu s": count / cpu_used}


async def memory(target: Target, _: float) -> dict[str, float]:
    """Measure the memory of an idle connection: the growth of resident memory between the two ``IDLE_CONNECTIONS``."""
    clients: list[Client] = []
    sizes = []
    for count in IDLE_CONNECTIONS:
        while len(clients) < count:
            batch = range(len(clients), min(count, len(clients) + 100))
            clients += await asyncio.gather(*map(target.connect, batch))
        await asyncio.sleep(2)
        sizes.append(target.memory())
    await close(clients)
    return {"kB/connection": (sizes[1] - sizes[0]) / (IDLE_CONNECTIONS[1] - IDLE_CONNECTIONS[0]) / 1000}


async def close(clients: list[Client]) -> None:
    for client in clients:
        client.transport.abort()
    await asyncio.sleep(1.5)


SCENARIOS: dict[str, Callable[[Target, float], Awaitable[dict[str, float]]]] = {
    "fanout": fanout,
    "latency": latency,
    "rooms": rooms,
    "connect": connect,
    "memory": memory,
}


@contextlib.contextmanager
def started_server(folder: Path) -> Iterator[Target]:
    with Stack(folder / "data") as stack:
        migrations.apply(stack.postgres.url)
        settings = {
            "APP_ENV": "test",
            "HOST": "127.0.0.1",
            "PORT": "0",
            "BCRYPT_ROUNDS": "4",
            "RATE_LIMIT_AUTH": "off",
            "RATE_LIMIT_REFRESH": "off",
            "RATE_LIMIT_ACCOUNT": "off",
            "RATE_LIMIT_DEFAULT": "off",
            "LOG_LEVEL": "info",
            "JWT_SECRET": secrets.token_hex(32),
            "WS_FRAMES_PER_SECOND": "100000",
            "WS_BURST": "100000",
        }
        environment = {**os.environ, **stack.environment, **settings}
        log = folder / "server.log"
        with log.open("wb") as output:
            process = subprocess.Popen(
                [sys.executable, str(ROOT / "run.py"), "server"], env=environment, stdout=output, stderr=output
            )
        try:
            port = int(wait_for_log(log, r"address\s*=\s*http://127.0.0.1:(\d+)|\"address\":\"http://127.0.0.1:(\d+)"))
            access_tokens, workspaces = create_users_and_workspaces(stack.postgres.url, settings["JWT_SECRET"])
            yield Target("ours", port, process.pid, access_tokens, workspaces)
        finally:
            process.send_signal(signal.SIGKILL)
            process.wait()
            stack.mongo.kill()


def wait_for_log(log: Path, pattern: str) -> str:
    for _ in range(300):
        if match := re.search(pattern, log.read_text()):
            return next(group for group in match.groups() if group)
        time.sleep(0.1)
    raise SystemExit(log.read_text())


def create_users_and_workspaces(url: str, secret: str) -> tuple[list[str], list[str]]:
    """Create ``USERS`` members of one project; return their access tokens and the ids of its workspaces."""
    with psycopg.connect(url, autocommit=True) as connection:
        sessions = connection.execute(
            """
            WITH people AS (
                INSERT INTO users (email, name, password_hash)
                SELECT 'user' || n || '@example.org', 'Somebody', 'none' FROM generate_series(1, %s) n RETURNING id
            ), project AS (
                INSERT INTO projects (name) VALUES ('Bench') RETURNING id
            ), joined AS (
                INSERT INTO members (project_id, user_id, role)
                SELECT project.id, people.id, 'COLLABORATOR' FROM project, people
            )
            INSERT INTO sessions (user_id, expires_at) SELECT id, now() + interval '1 day' FROM people
            RETURNING user_id, id
            """,
            [USERS],
        ).fetchall()
        workspaces = connection.execute(
            """
            INSERT INTO workspaces (project_id, name)
            SELECT id, 'Room ' || n FROM projects, generate_series(1, %s) n RETURNING id
            """,
            [ROOMS],
        ).fetchall()
        connection.execute("ANALYZE")
    keys, now = tokens.KeyRing.from_secrets(secret), datetime.now(UTC)
    access_tokens = [tokens.issue(user=user, session=id, keys=keys, now=now, ttl=86400) for user, id in sessions]
    return access_tokens, [str(id) for (id,) in workspaces]


@contextlib.contextmanager
def baseline() -> Iterator[Target]:
    with subprocess.Popen([sys.executable, __file__, "--serve-baseline"], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            port = int(process.stdout.readline())
            yield Target("baseline", port, process.pid, ["nobody"], [str(room) for room in range(ROOMS)])
        finally:
            process.kill()


async def serve_baseline() -> None:
    """Serve the baseline: a bare aiohttp handler without authentication, authorization, history or pub/sub.

    It builds each frame once for all members.
    """
    members: dict[str, set[asyncio.Transport]] = {}

    async def handler(request: web.Request) -> web.WebSocketResponse:
        socket = web.WebSocketResponse(compress=False)
        await socket.prepare(request)
        transport = request.transport
        assert transport is not None
        transport.write(websocket_frame(orjson.dumps(WELCOME)))
        try:
            async for message in socket:
                frame = orjson.loads(message.data)
                room = members.setdefault(frame["data"]["workspaceId"], set())
                if frame["event"] == "join:workspace":
                    room.add(transport)
                else:
                    event = {
                        "event": "collaboration:event",
                        "data": {
                            "eventId": "1780000000000-0",
                            **frame["data"],
                            "type": "FILE_CHANGE",
                            "userId": "0" * 36,
                            "userName": "Somebody",
                            "timestamp": "2026-01-01T00:00:00.000Z",
                        },
                    }
                    frame_bytes = websocket_frame(orjson.dumps(event))
                    for member in room:
                        if member is not transport and not member.is_closing():
                            member.write(frame_bytes)
                transport.write(websocket_frame(orjson.dumps({"event": "ack", "data": {}, "id": frame["id"]})))
        finally:
            for room in members.values():
                room.discard(transport)
        return socket

    app = web.Application()
    app.router.add_get("/ws", handler)
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0, backlog=1024)
    await site.start()
    print(runner.addresses[0][1], flush=True)
    await asyncio.Event().wait()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--seconds", type=float, default=5.0, help="of each measurement")
    parser.add_argument("--only", default=",".join(SCENARIOS), help="comma list of: %(default)s")
    parser.add_argument("--serve-baseline", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.serve_baseline:
        uvloop.run(serve_baseline())
        return
    _, hard_limit = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard_limit, hard_limit))
    scenarios = [name for name in SCENARIOS if name in arguments.only.split(",")]
    with (
        tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder,
        started_server(Path(folder)) as server,
        baseline() as other,
    ):
        print(f"{'':10} {'':18} {'ours':>12} {'baseline':>12} {'ratio':>7}")
        for name in scenarios:
            result = uvloop.run(SCENARIOS[name](server, arguments.seconds))
            reference = uvloop.run(SCENARIOS[name](other, arguments.seconds))
            for figure, value in result.items():
                print(
                    f"{name:10} {figure:18} {value:12,.1f} {reference[figure]:12,.1f} {value / reference[figure]:7.2f}",
                    flush=True,
                )


if __name__ == "__main__":
    main()
