#!/usr/bin/env python3
"""Measure documents: durable updates/s, propagation, and the cost of opening a large document.

Usage: python scripts/bench/documents.py [--seconds N]

Starts its own stores and servers. The clients run in this process, on their own core if the machine has one.
"""

import argparse
import asyncio
import contextlib
import itertools
import os
import random
import statistics
import sys
import tempfile
import time
from base64 import b64encode
from collections.abc import AsyncIterator
from pathlib import Path

import aiohttp
import orjson
import uvloop
from pycrdt import Doc, Text

ROOT = Path(__file__).parent.parent.parent
sys.path.insert(0, str(ROOT))

from server import migrations  # noqa: E402
from server.devstack.stack import Stack  # noqa: E402
from server.documents import wire  # noqa: E402
from tests.actors import Actor  # noqa: E402
from tests.conftest import TEST_SETTINGS  # noqa: E402
from tests.processes import Processes, Server  # noqa: E402

RATE_LIMITS_OFF = {"WS_FRAMES_PER_SECOND": "100000", "WS_BURST": "100000"}
CLOCK_TICKS = os.sysconf("SC_CLK_TCK")


class Typist:
    """A client that sends small insertions, as a keyboard does.

    Every insertion is new, because an update that the server already has costs it nothing.
    """

    def __init__(self, socket: aiohttp.ClientWebSocketResponse, document: str) -> None:
        self.socket, self.document = socket, document
        self.doc: Doc[Text] = Doc()
        self.content = self.doc.get("content", type=Text)

    def next_update(self) -> bytes:
        before = self.doc.get_state()
        self.content.insert(random.randrange(len(self.content) + 1), "x")
        return self.doc.get_update(before)

    def frame(self, update: bytes, id: int) -> str:
        data = {"documentId": self.document, "update": b64encode(update).decode()}
        return orjson.dumps({"event": "document:update", "data": data, "id": id}).decode()

    async def type(self, until: float) -> int:
        """Type until the given time, and return the number of acknowledged updates."""
        for count in itertools.count():
            if time.perf_counter() >= until:
                return count
            await self.socket.send_str(self.frame(self.next_update(), count))
            while b'"ack"' not in (raw := (await self.socket.receive()).data.encode()):
                assert b'"error"' not in raw, raw
        raise AssertionError


async def open_document(actor: Actor, document: str) -> aiohttp.ClientWebSocketResponse:
    socket = await actor.http.ws_connect(f"{actor.base}/ws", headers=actor.headers, max_msg_size=0)
    await socket.receive()
    await socket.send_str(orjson.dumps({"event": "document:open", "data": {"documentId": document}, "id": 1}).decode())
    while '"ack"' not in (await socket.receive()).data:
        continue
    return socket


def cpu_seconds(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / CLOCK_TICKS


async def throughput(
    actor: Actor, server: Server, workspace: str, *, documents: int, typists: int, seconds: float
) -> None:
    ids = [await make_document(actor, workspace) for _ in range(documents)]
    sockets = [await open_document(actor, ids[n % documents]) for n in range(typists)]
    writers = [Typist(socket, ids[n % documents]) for n, socket in enumerate(sockets)]
    cpu, started = cpu_seconds(server.pid), time.perf_counter()
    counts = await asyncio.gather(*(writer.type(started + seconds) for writer in writers))
    elapsed, cpu = time.perf_counter() - started, cpu_seconds(server.pid) - cpu
    rate = sum(counts) / elapsed
    print(
        f"{documents:4} documents, {typists:4} typists: {rate:7.0f} durable updates/s, "
        f"{sum(counts) / cpu:7.0f} per second of the server's processor ({cpu / elapsed:.0%} of a core)"
    )
    for socket in sockets:
        await socket.close()
    versions = [(await actor.get(f"/documents/{id}"))["version"] for id in ids]
    assert sum(versions) == sum(counts) + documents, "an acknowledged update was not new"


async def propagation(actors: list[Actor], workspace: str, *, editors: int, seconds: float) -> None:
    """Measure the delay from one editor, who types 20 times a second, to all others, on both servers."""
    document = await make_document(actors[0], workspace)
    typist = Typist(await open_document(actors[0], document), document)
    listeners = [await open_document(actors[n % len(actors)], document) for n in range(editors - 1)]
    sent: dict[str, float] = {}
    delays: list[float] = []

    async def listen(socket: aiohttp.ClientWebSocketResponse) -> None:
        async for message in socket:
            if '"document:update"' in message.data:
                now = time.perf_counter()
                delays.append(now - sent[orjson.loads(message.data)["data"]["update"]])

    tasks = [asyncio.ensure_future(listen(socket)) for socket in listeners]
    for _ in range(int(seconds * 20)):
        update = typist.next_update()
        sent[b64encode(update).decode()] = time.perf_counter()
        await typist.socket.send_str(typist.frame(update, 1))
        await asyncio.sleep(0.05)
    await asyncio.sleep(0.5)
    for task in tasks:
        task.cancel()
    cuts = statistics.quantiles(delays, n=100)
    print(
        f"{editors:4} editors on {len(actors)} servers: p50 {cuts[49] * 1000:.1f} ms, p99 {cuts[98] * 1000:.1f} ms, "
        f"{len(delays)} of {(editors - 1) * int(seconds * 20)} received"
    )
    for socket in (typist.socket, *listeners):
        await socket.close()


def scattered_update(editors: int, edits: int) -> bytes:
    """Return one update with ``edits`` insertions of ten characters at random positions, by several editors."""
    merged, generator = Doc(), random.Random(1)
    for _ in range(editors):
        doc: Doc[Text] = Doc()
        content = doc.get("content", type=Text)
        with doc.transaction():
            for _ in range(edits // editors):
                content.insert(generator.randrange(len(content) + 1), "0123456789")
        merged.apply_update(doc.get_update())
    return merged.get_update()


async def opening(actor: Actor, workspace: str) -> None:
    """Measure the opening of 1 MB of text that consists of 100,000 scattered insertions."""
    document, update = await make_document(actor, workspace), scattered_update(20, 100_000)
    protocols = ("collab.v1", f"bearer.{actor.access_token}")
    async with actor.http.ws_connect(f"{actor.base}/yjs/{document}", protocols=protocols, max_msg_size=0) as socket:
        await socket.receive()
        await socket.send_bytes(wire.sync(wire.UPDATE, update))
        await socket.send_bytes(wire.sync(wire.STEP_1, b"\x00"))  # the server responds after the update is durable
        while (await socket.receive()).data[:2] != bytes([wire.SYNC, wire.STEP_2]):
            continue
    await asyncio.sleep(0.5)  # until the server unloads the document
    sockets = []
    for state in ("cold", "warm"):
        started = time.perf_counter()
        sockets.append(await open_document(actor, document))
        milliseconds = (time.perf_counter() - started) * 1000
        print(f"opening 1 MB with 100,000 edits ({len(update) / 1e6:.1f} MB), {state}: {milliseconds:.0f} ms")
    for socket in sockets:
        await socket.close()


async def make_document(actor: Actor, workspace: str) -> str:
    document = await actor.post(f"/workspaces/{workspace}/documents", {"path": f"{time.perf_counter_ns()}.txt"})
    return document["id"]


@contextlib.asynccontextmanager
async def bench_environment() -> AsyncIterator[tuple[list[Server], Actor, str]]:
    with (
        tempfile.TemporaryDirectory(prefix="bench-", ignore_cleanup_errors=True) as folder,
        Stack(Path(folder) / "data") as stack,
        Processes(TEST_SETTINGS | stack.environment | RATE_LIMITS_OFF, Path(folder)) as processes,
    ):
        migrations.apply(stack.postgres.url)
        servers = [processes.server() for _ in range(2)]
        async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as http:
            actor = await Actor(http, servers[0].base, "Ada").register()
            yield servers, actor, await actor.make_workspace()


async def main(seconds: float) -> None:
    async with bench_environment() as (servers, actor, workspace):
        await opening(actor, workspace)
        for documents, typists in ((1, 1), (1, 50), (50, 100), (200, 200)):
            await throughput(actor, servers[0], workspace, documents=documents, typists=typists, seconds=seconds)
        for editors in (2, 50):
            both = [actor, actor.at(servers[1].base)]
            await propagation(both, workspace, editors=editors, seconds=seconds)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=5)
    uvloop.run(main(parser.parse_args().seconds))
