"""A client that reads slowly, or not at all, harms only itself."""

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
from tests.patience import PATIENCE_SECONDS
from tests.processes import Processes, Server
from tests.realtime.test_frames import footprint
from tests.sockets import Socket


def box(frames: int = 3, size: int = 100) -> Outbox:
    return Outbox(most_frames=frames, most_bytes=size)


def contents(outbox: Outbox) -> list[bytes]:
    return [*outbox.take(1 << 20)]


def test_frames_leave_in_the_order_in_which_they_came() -> None:
    outbox = box()
    for frame in (b"1", b"2", b"3"):
        assert outbox.put(frame, Delivery.DURABLE)
    assert contents(outbox) == [b"1", b"2", b"3"]
    assert (len(outbox), outbox.bytes) == (0, 0)


def test_the_newest_of_a_key_replaces_the_one_that_waits() -> None:
    outbox = box()
    outbox.put(b"ada 1", Delivery.NEWEST, "ada")
    outbox.put(b"durable", Delivery.DURABLE)
    outbox.put(b"bob 1", Delivery.NEWEST, "bob")
    outbox.put(b"ada 2", Delivery.NEWEST, "ada")
    assert contents(outbox) == [b"durable", b"bob 1", b"ada 2"]


def test_at_the_bound_ephemeral_frames_go_first_and_the_oldest_of_them_before_others() -> None:
    outbox = box()
    outbox.put(b"old", Delivery.DROPPABLE)
    outbox.put(b"cursor", Delivery.NEWEST, "ada")
    outbox.put(b"1", Delivery.DURABLE)
    assert outbox.put(b"2", Delivery.DURABLE)
    assert outbox.dropped == 1
    assert outbox.put(b"3", Delivery.DURABLE)
    assert outbox.put(b"cursor", Delivery.NEWEST, "ada"), "dropped, which is no reason to end"
    assert outbox.dropped == 1
    assert not outbox.put(b"4", Delivery.DURABLE)
    assert contents(outbox) == [b"1", b"2", b"3"]


def test_the_bound_in_bytes_holds_but_for_a_frame_that_waits_alone() -> None:
    outbox = box(frames=1000)
    assert outbox.put(b"x" * 500, Delivery.DURABLE)
    assert not outbox.put(b"y", Delivery.DURABLE)
    assert contents(outbox) == [b"x" * 500]
    assert outbox.put(b"x" * 60, Delivery.DURABLE)
    assert not outbox.put(b"y" * 60, Delivery.DURABLE)


CLOSE = b"\x88\x80\0\0\0\0"  # masked with zeros


async def deaf(actor: Actor, workspace: str) -> sockets.socket:
    """A raw connection in the workspace, whose owner will not read; with small buffers, for tests to be quick."""
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
    """How many of these the server has a file descriptor for."""
    ours, theirs = int(server.base.rpartition(":")[2]), {each.getsockname()[1] for each in clients}
    lines = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:]]
    ends = [(*(int(line[at].rpartition(":")[2], 16) for at in (1, 2)), line[9]) for line in lines]
    return sum(local == ours and remote in theirs and inode != "0" for local, remote, inode in ends)


async def pour(socket: Socket, workspace: str, kilobytes: int) -> None:
    for number in range(kilobytes // 100):
        await socket.push("file:change", workspaceId=workspace, change=[number, "x" * 100_000])


async def test_who_does_not_read_is_out_of_the_room_and_cut_off(processes: Processes, make_actor: MakeActor) -> None:
    there, server = processes.server(), processes.server(WS_OUTBOX_BYTES=str(1 << 20))
    alice, bob = await make_actor("Alice", there.base), await make_actor("Bob", server.base)
    workspace = await alice.make_workspace(None, bob)
    hers = await alice.connect(workspace)
    his, closing = await deaf(bob, workspace), [await deaf(bob, workspace) for _ in range(5)]
    await hers.assert_push("USER_JOIN", userId=bob.id)
    await pour(hers, workspace, 3_000)
    before = footprint(server.pid)
    assert still_open(server, his, *closing) == 6
    for each in closing:  # who says goodbye, and still does not read
        await asyncio.get_running_loop().sock_sendall(each, CLOSE)
    await pour(hers, workspace, 12_000)
    left = [frame["data"]["type"] for frame in hers.heard]
    if not left:
        left = [(await hers.next())["data"]["type"]]
    assert left == ["USER_LEAVE"]
    async with asyncio.timeout(PATIENCE_SECONDS):  # to be cut off
        while still_open(server, his, *closing):
            await asyncio.sleep(0.1)
    after = footprint(server.pid)
    assert after[0] - before[0] < 40 << 20, "memory"
    for each in (his, *closing):
        each.close()


async def test_who_reads_again_too_late_is_told_why(make_server: MakeServer, make_actor: MakeActor) -> None:
    base = await make_server(ws_outbox_frames=8)
    alice, bob = await make_actor("Alice", base), await make_actor("Bob", base)
    workspace = await alice.make_workspace(None, bob)
    hers, his = await alice.connect(workspace), await bob.connect(workspace)
    while "USER_LEAVE" not in [frame["data"]["type"] for frame in hers.heard]:
        await pour(hers, workspace, 100)
    assert await his.closed() == 1013


def sample(name: str, **labels: str) -> float:
    return REGISTRY.get_sample_value(name, labels) or 0


async def test_what_a_full_outbox_drops_is_counted(
    make_server: MakeServer, make_actor: MakeActor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("server.ops.watch.LOOK_SECONDS", 0.01)
    base = await make_server(ws_outbox_frames=4)
    alice, bob = await make_actor("Alice", base), await make_actor("Bob", base)
    workspace = await alice.make_workspace(None, bob)
    hers, his = await alice.connect(workspace), await deaf(bob, workspace)
    await hers.assert_push("USER_JOIN", userId=bob.id)
    while sample("websocket_outbox_frames") < 4:
        await pour(hers, workspace, 100)
        looks = sample("event_loop_lag_seconds_count")
        while sample("event_loop_lag_seconds_count") == looks:  # else one too many would end it
            await asyncio.sleep(0.01)
    before = sample("websocket_frames_dropped_total", delivery="ephemeral")
    await hers.push("cursor:update", workspaceId=workspace, position=1)
    async with asyncio.timeout(PATIENCE_SECONDS):
        while sample("websocket_frames_dropped_total", delivery="ephemeral") != before + 1:
            await asyncio.sleep(0.01)
    await hers.refute_push()
    his.close()


async def test_a_deaf_client_delays_nobody(processes: Processes, make_actor: MakeActor) -> None:
    here, there = processes.server().base, processes.server().base
    alice, bob, carol = [
        await make_actor(name, base) for name, base in (("Alice", there), ("Bob", here), ("Carol", here))
    ]
    workspace = await alice.make_workspace(None, bob, carol)
    hers, carols = await alice.connect(workspace), await carol.connect(workspace)
    his = await deaf(bob, workspace)
    for number in range(60):
        await hers.push("file:change", workspaceId=workspace, change=[number, "x" * 50_000])
        while (await carols.next())["data"]["type"] != "FILE_CHANGE":
            pass
    his.close()


async def test_who_reads_again_has_every_durable_event_in_order(alice: Actor, bob: Actor) -> None:
    workspace = await alice.make_workspace(None, bob)
    hers, his = await alice.connect(workspace), await bob.connect(workspace)
    changes = [[number, "x" * 20_000] for number in range(100)]  # waits in buffers and outbox, within its bounds
    for each in changes:
        await hers.push("file:change", workspaceId=workspace, change=each)
        if each[0] % 10 == 0:
            await hers.push("cursor:update", workspaceId=workspace, position=each[0])
    heard: list[Any] = []
    while len(heard) < len(changes):
        data = (await his.next())["data"]
        heard += [data["change"]] if data["type"] == "FILE_CHANGE" else []
    assert heard == changes


async def test_of_many_cursors_the_newest_arrives(make_server: MakeServer, make_actor: MakeActor) -> None:
    base = await make_server(ws_frames_per_second=10_000, ws_burst=10_000)
    alice, bob = await make_actor("Alice", base), await make_actor("Bob", base)
    workspace = await alice.make_workspace(None, bob)
    hers, his = await alice.connect(workspace), await bob.connect(workspace)
    began = time.monotonic()
    for number in range(1000):
        await hers.send("cursor:update", {"workspaceId": workspace, "fileId": "f", "position": number})
    last = await hers.push("cursor:update", workspaceId=workspace, fileId="f", position="last")
    assert last == {}
    heard = [await his.assert_push("CURSOR_UPDATE", userId=alice.id, fileId="f")]
    while heard[-1]["position"] != "last":
        heard.append(await his.assert_push("CURSOR_UPDATE"))
    assert len(heard) <= (time.monotonic() - began) * 30 + 1
    numbers = [each["position"] for each in heard[:-1]]
    assert numbers == sorted(numbers)
    assert "eventId" not in heard[0]
    await his.refute_push()


@pytest.mark.parametrize("pause", [0.0, 0.1])
async def test_a_lone_cursor_is_not_delayed(
    alice: Actor, bob: Actor, pause: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("server.realtime.cursors.CURSORS_PER_SECOND", 0.01)
    workspace = await alice.make_workspace(None, bob)
    hers, his = await alice.connect(workspace), await bob.connect(workspace)
    await asyncio.sleep(pause)
    await hers.push("cursor:update", workspaceId=workspace, position=1)
    await his.assert_push("CURSOR_UPDATE")
