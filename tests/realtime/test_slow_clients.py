"""Backpressure: a client that reads slowly, or not at all, affects only itself."""

import asyncio
import socket as sockets
import time
from pathlib import Path
from typing import Any

import pytest
from prometheus_client import REGISTRY

from server.realtime.outbox import Delivery, Outbox
from tests.actors import Actor
from tests.conftest import MakeActor, MakeServer
from tests.processes import Processes, Server
from tests.realtime.test_frames import footprint
from tests.sockets import SocketClient
from tests.timeouts import WAIT_TIMEOUT_SECONDS


def make_outbox(frames: int = 3, size: int = 100) -> Outbox:
    return Outbox(max_frames=frames, max_bytes=size)


def contents(outbox: Outbox) -> list[bytes]:
    return [*outbox.take(1 << 20)]


def test_outbox_is_first_in_first_out() -> None:
    outbox = make_outbox()
    for frame in (b"1", b"2", b"3"):
        assert outbox.put(frame, Delivery.DURABLE)
    assert contents(outbox) == [b"1", b"2", b"3"]
    assert (len(outbox), outbox.bytes) == (0, 0)


def test_newest_frame_of_a_key_replaces_the_pending_one() -> None:
    outbox = make_outbox()
    outbox.put(b"ada 1", Delivery.COALESCED, "ada")
    outbox.put(b"durable", Delivery.DURABLE)
    outbox.put(b"bob 1", Delivery.COALESCED, "bob")
    outbox.put(b"ada 2", Delivery.COALESCED, "ada")
    assert contents(outbox) == [b"durable", b"bob 1", b"ada 2"]


def test_full_outbox_drops_ephemeral_frames_oldest_first() -> None:
    outbox = make_outbox()
    outbox.put(b"old", Delivery.DROPPABLE)
    outbox.put(b"cursor", Delivery.COALESCED, "ada")
    outbox.put(b"1", Delivery.DURABLE)
    assert outbox.put(b"2", Delivery.DURABLE)
    assert outbox.dropped == 1
    assert outbox.put(b"3", Delivery.DURABLE)
    assert outbox.put(b"cursor", Delivery.COALESCED, "ada"), "dropped, which does not close the connection"
    assert outbox.dropped == 1
    assert not outbox.put(b"4", Delivery.DURABLE)
    assert contents(outbox) == [b"1", b"2", b"3"]


def test_outbox_is_bounded_in_bytes_except_for_a_single_frame() -> None:
    outbox = make_outbox(frames=1000)
    assert outbox.put(b"x" * 500, Delivery.DURABLE)
    assert not outbox.put(b"y", Delivery.DURABLE)
    assert contents(outbox) == [b"x" * 500]
    assert outbox.put(b"x" * 60, Delivery.DURABLE)
    assert not outbox.put(b"y" * 60, Delivery.DURABLE)


CLOSE = b"\x88\x80\0\0\0\0"  # masked with zeros


async def connect_without_reading(actor: Actor, workspace: str) -> sockets.socket:
    """Join the workspace by a raw connection that is never read, with small buffers to keep tests quick."""
    host, port = actor.base.removeprefix("http://").split(":")
    raw = sockets.socket()
    raw.setsockopt(sockets.SOL_SOCKET, sockets.SO_RCVBUF, 4096)
    raw.setblocking(False)
    loop = asyncio.get_running_loop()
    await loop.sock_connect(raw, (host, int(port)))
    await loop.sock_sendall(
        raw,
        (
            f"GET /ws HTTP/1.1\r\nHost: {host}\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n"
            "Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n"
            f"Authorization: Bearer {actor.access_token}\r\n\r\n"
        ).encode(),
    )
    await loop.sock_recv(raw, 4096)
    join = b'{"event":"join:workspace","data":{"workspaceId":"%s"}}' % workspace.encode()
    await loop.sock_sendall(raw, b"\x81" + bytes([0x80 | len(join)]) + b"\0\0\0\0" + join)  # masked with zeros
    return raw


def still_open(server: Server, *clients: sockets.socket) -> int:
    """Return how many of these connections the server still has a file descriptor for."""
    server_port, client_ports = int(server.base.rpartition(":")[2]), {client.getsockname()[1] for client in clients}
    lines = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:]]
    ends = [(*(int(line[column].rpartition(":")[2], 16) for column in (1, 2)), line[9]) for line in lines]
    return sum(local == server_port and remote in client_ports and inode != "0" for local, remote, inode in ends)


async def send_changes(socket: SocketClient, workspace: str, kilobytes: int) -> None:
    for number in range(kilobytes // 100):
        await socket.push("file:change", workspaceId=workspace, change=[number, "x" * 100_000])


async def test_client_that_does_not_read_leaves_the_room_and_is_aborted(
    processes: Processes, make_actor: MakeActor
) -> None:
    there, server = processes.server(), processes.server(WS_OUTBOX_BYTES=str(1 << 20))
    alice, bob = await make_actor("Alice", there.base), await make_actor("Bob", server.base)
    workspace = await alice.make_workspace(None, bob)
    hers = await alice.connect(workspace)
    his, closing = (
        await connect_without_reading(bob, workspace),
        [await connect_without_reading(bob, workspace) for _ in range(5)],
    )
    await hers.assert_push("USER_JOIN", userId=bob.id)
    await send_changes(hers, workspace, 3_000)
    before = footprint(server.pid)
    assert still_open(server, his, *closing) == 6
    for client in closing:  # sends a close frame, and still does not read
        await asyncio.get_running_loop().sock_sendall(client, CLOSE)
    await send_changes(hers, workspace, 12_000)
    left = [frame["data"]["type"] for frame in hers.received]
    if not left:
        left = [(await hers.next())["data"]["type"]]
    assert left == ["USER_LEAVE"]
    async with asyncio.timeout(WAIT_TIMEOUT_SECONDS):  # until the server aborts them
        while still_open(server, his, *closing):
            await asyncio.sleep(0.1)
    after = footprint(server.pid)
    assert after[0] - before[0] < 40 << 20, "memory"
    for client in (his, *closing):
        client.close()


async def test_client_that_reads_again_too_late_gets_close_code_1013(
    make_server: MakeServer, make_actor: MakeActor
) -> None:
    base = await make_server(ws_outbox_frames=8)
    alice, bob = await make_actor("Alice", base), await make_actor("Bob", base)
    workspace = await alice.make_workspace(None, bob)
    hers, his = await alice.connect(workspace), await bob.connect(workspace)
    while "USER_LEAVE" not in [frame["data"]["type"] for frame in hers.received]:
        await send_changes(hers, workspace, 100)
    assert await his.closed() == 1013


def sample(name: str, **labels: str) -> float:
    return REGISTRY.get_sample_value(name, labels) or 0


async def test_frames_dropped_by_a_full_outbox_are_counted(
    make_server: MakeServer, make_actor: MakeActor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("server.ops.sampling.SAMPLE_INTERVAL_SECONDS", 0.01)
    base = await make_server(ws_outbox_frames=4)
    alice, bob = await make_actor("Alice", base), await make_actor("Bob", base)
    workspace = await alice.make_workspace(None, bob)
    hers, his = await alice.connect(workspace), await connect_without_reading(bob, workspace)
    await hers.assert_push("USER_JOIN", userId=bob.id)
    while sample("websocket_outbox_frames") < 4:
        await send_changes(hers, workspace, 100)
        samples = sample("event_loop_lag_seconds_count")
        while sample("event_loop_lag_seconds_count") == samples:  # else one frame too many would close the connection
            await asyncio.sleep(0.01)
    before = sample("websocket_frames_dropped_total", delivery="ephemeral")
    await hers.push("cursor:update", workspaceId=workspace, position=1)
    async with asyncio.timeout(WAIT_TIMEOUT_SECONDS):
        while sample("websocket_frames_dropped_total", delivery="ephemeral") != before + 1:
            await asyncio.sleep(0.01)
    await hers.refute_push()
    his.close()


async def test_client_that_does_not_read_delays_no_other_client(processes: Processes, make_actor: MakeActor) -> None:
    here, there = processes.server().base, processes.server().base
    alice, bob, carol = [
        await make_actor(name, base) for name, base in (("Alice", there), ("Bob", here), ("Carol", here))
    ]
    workspace = await alice.make_workspace(None, bob, carol)
    hers, carols = await alice.connect(workspace), await carol.connect(workspace)
    his = await connect_without_reading(bob, workspace)
    for number in range(60):
        await hers.push("file:change", workspaceId=workspace, change=[number, "x" * 50_000])
        while (await carols.next())["data"]["type"] != "FILE_CHANGE":
            pass
    his.close()


async def test_client_that_reads_again_gets_every_durable_event_in_order(alice: Actor, bob: Actor) -> None:
    workspace = await alice.make_workspace(None, bob)
    hers, his = await alice.connect(workspace), await bob.connect(workspace)
    changes = [[number, "x" * 20_000] for number in range(100)]  # fits into the buffers and the outbox
    for change in changes:
        await hers.push("file:change", workspaceId=workspace, change=change)
        if change[0] % 10 == 0:
            await hers.push("cursor:update", workspaceId=workspace, position=change[0])
    received: list[Any] = []
    while len(received) < len(changes):
        data = (await his.next())["data"]
        received += [data["change"]] if data["type"] == "FILE_CHANGE" else []
    assert received == changes


async def test_newest_of_many_cursors_arrives(make_server: MakeServer, make_actor: MakeActor) -> None:
    base = await make_server(ws_frames_per_second=10_000, ws_burst=10_000)
    alice, bob = await make_actor("Alice", base), await make_actor("Bob", base)
    workspace = await alice.make_workspace(None, bob)
    hers, his = await alice.connect(workspace), await bob.connect(workspace)
    began = time.monotonic()
    for number in range(1000):
        await hers.send("cursor:update", {"workspaceId": workspace, "fileId": "f", "position": number})
    last = await hers.push("cursor:update", workspaceId=workspace, fileId="f", position="last")
    assert last == {}
    cursors = [await his.assert_push("CURSOR_UPDATE", userId=alice.id, fileId="f")]
    while cursors[-1]["position"] != "last":
        cursors.append(await his.assert_push("CURSOR_UPDATE"))
    assert len(cursors) <= (time.monotonic() - began) * 30 + 1
    numbers = [cursor["position"] for cursor in cursors[:-1]]
    assert numbers == sorted(numbers)
    assert "eventId" not in cursors[0]
    await his.refute_push()


@pytest.mark.parametrize("pause", [0.0, 0.1])
async def test_single_cursor_is_not_delayed(
    alice: Actor, bob: Actor, pause: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("server.realtime.cursors.MAX_CURSOR_UPDATES_PER_SECOND", 0.01)
    workspace = await alice.make_workspace(None, bob)
    hers, his = await alice.connect(workspace), await bob.connect(workspace)
    await asyncio.sleep(pause)
    await hers.push("cursor:update", workspaceId=workspace, position=1)
    await his.assert_push("CURSOR_UPDATE")
