"""Every frame with an id gets exactly one reply; invalid and too many frames do not affect other clients."""

import asyncio
import itertools
import os
import time
from pathlib import Path

import aiohttp
import orjson
import pytest

from server.realtime.endpoint import REJECTION_DELAY_SECONDS
from tests.actors import Actor
from tests.conftest import MakeActor, MakeServer
from tests.processes import Processes
from tests.sockets import Closed, ErrorReply, SocketClient
from tests.timeouts import WAIT_TIMEOUT_SECONDS


async def reply_to(socket: SocketClient, text: str) -> dict[str, object]:
    await socket.raw.send_str(text)
    return await socket.next()


async def test_every_frame_with_an_id_gets_one_reply(alice: Actor) -> None:
    socket = await alice.connect()
    for id in ("a", 7, 7.5, 0, ""):
        await socket.send("ping", {}, id=id)
        reply = await socket.next()
        assert (reply["event"], reply["id"]) == ("ack", id)
    await socket.send("ping")
    await socket.refute_push()


async def test_malformed_frame_gets_an_error_and_the_socket_stays_open(alice: Actor) -> None:
    socket = await alice.connect()
    for text in (
        "",
        "nonsense",
        "[]",
        '"ping"',
        "null",
        '{"data": {}}',
        '{"event": 7}',
        '{"event": "ping", "data": []}',
        '{"event": "ping", "data": {}, "more": 1}',
        '{"event": "ping", "id": {}}',
        '{"event": "ping", "id": true}',
        "[" * 100_000,
        '{"event": "ping", "data": {"a": "\\u0000"}}',
        '{"event": "ping", "data": {"a": "\\ud800"}}',
    ):
        reply = await reply_to(socket, text)
        assert reply["event"] == "error", text
        assert reply["data"]["code"] == "malformed", text  # type: ignore[index]
    await socket.raw.send_bytes(b"\0\1")
    assert (await socket.next())["data"]["code"] == "malformed"
    await socket.push("ping")


async def test_malformed_frame_with_an_id_gets_an_error_with_that_id(alice: Actor) -> None:
    reply = await reply_to(await alice.connect(), '{"event": "ping", "data": 1, "id": "x"}')
    assert reply["id"] == "x"


async def test_unknown_event_and_invalid_data_have_different_codes(alice: Actor) -> None:
    socket = await alice.connect()
    with pytest.raises(ErrorReply, match="unknown_event"):
        await socket.push("nonsense")
    with pytest.raises(ErrorReply, match="validation_failed") as rejected:
        await socket.push("join:workspace", workspaceId="nonsense", sinc=1)
    assert {detail["field"] for detail in rejected.value.data["details"]} == {"workspaceId", "sinc"}
    with pytest.raises(ErrorReply, match="validation_failed"):
        await socket.push("ping", unknown=1)


async def test_frame_larger_than_the_announced_maximum_closes_the_socket(alice: Actor, bob: Actor) -> None:
    workspace = await alice.make_workspace(None, bob)
    hers, his = await alice.connect(workspace), await bob.connect(workspace)
    largest = "x" * (hers.welcome["maxMessageBytes"] - 200)
    await hers.push("file:change", workspaceId=workspace, change=largest)
    assert (await his.assert_push("FILE_CHANGE"))["change"] == largest
    await hers.assert_push("USER_JOIN")
    await hers.send("file:change", {"workspaceId": workspace, "change": largest + "x" * 400}, id=9)
    assert await hers.closed() == 1009


async def test_frames_over_the_rate_limit_are_rejected_with_their_ids(
    make_server: MakeServer, make_actor: MakeActor
) -> None:
    alice = await make_actor("Alice", await make_server(ws_frames_per_second=1, ws_burst=20))
    socket = await alice.connect()
    for id in range(40):
        await socket.send("ping", {}, id=id)
    replies = [await socket.next() for _ in range(40)]
    assert [reply["id"] for reply in replies] == [*range(40)]
    rejected = [reply["id"] for reply in replies if reply["event"] == "error"]
    assert 10 <= len(rejected) <= 20
    assert {reply["data"]["code"] for reply in replies if reply["event"] == "error"} == {"rate_limited"}
    await asyncio.sleep(1.5)
    await socket.push("ping")


async def test_client_that_sends_garbage_is_closed(alice: Actor, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("server.realtime.throttle.VIOLATION_WINDOW_SECONDS", 600.0)
    socket = await alice.connect()
    for _ in range(49):
        assert (await reply_to(socket, "garbage"))["event"] == "error"
    await socket.push("ping")
    await socket.raw.send_str("garbage")
    assert await socket.closed() == 4400


async def test_flooding_client_is_closed_after_ten_seconds_and_not_before(
    make_server: MakeServer, make_actor: MakeActor
) -> None:
    alice = await make_actor("Alice", await make_server(ws_frames_per_second=5, ws_burst=5))
    socket, began = await alice.connect(), time.monotonic()

    async def flood() -> None:
        while not socket.raw.closed:
            await socket.raw.send_str('{"event": "ping"}')
            await asyncio.sleep(0.02)

    flooding = asyncio.create_task(flood())
    assert await socket.closed() == 4400
    assert time.monotonic() - began >= 10
    flooding.cancel()
    await asyncio.gather(flooding, return_exceptions=True)


async def test_flood_is_throttled_and_does_not_delay_other_clients(processes: Processes, make_actor: MakeActor) -> None:
    there, here = processes.server(), processes.server()
    alice = await make_actor("Alice", there.base)
    bob, mallory = [await make_actor(name, here.base) for name in ("Bob", "Mallory")]
    workspace = await alice.make_workspace(None, bob, mallory)
    hers, his, evil = [await actor.connect(workspace) for actor in (alice, bob, mallory)]
    replies = 0

    async def flood() -> None:
        change = {"workspaceId": workspace, "change": 1}
        frame = orjson.dumps({"event": "file:change", "data": change, "id": 1}).decode()
        while not evil.raw.closed:
            for _ in range(100):
                await evil.raw.send_str(frame)
            await asyncio.sleep(0)

    async def drain() -> None:
        nonlocal replies
        while not evil.raw.closed:
            replies += '"id":1' in str((await evil.raw.receive()).data)

    before, began = footprint(here.pid), time.monotonic()
    noise = [asyncio.create_task(flood()), asyncio.create_task(drain())]
    for number in range(60):
        await change_and_wait(hers, his, workspace, number)
    after, seconds = footprint(here.pid), time.monotonic() - began
    for task in noise:
        task.cancel()
    await asyncio.gather(*noise, return_exceptions=True)
    evil.abort()
    # At most the frames that the rate limit allows, and one error per pause.
    assert replies <= 200 + seconds * (100 + 1 / REJECTION_DELAY_SECONDS)
    assert after[1] <= before[1] + 3, "file descriptors"
    assert after[0] - before[0] < 40 << 20, "memory"


async def change_and_wait(hers: SocketClient, his: SocketClient, workspace: str, number: int) -> None:
    """Send a change from her, wait until he receives it, and pause."""
    await hers.push("file:change", workspaceId=workspace, change=["sent", number])
    while (await his.next())["data"].get("change") != ["sent", number]:
        pass
    await asyncio.sleep(0.03)


async def test_ten_thousand_malformed_frames_leak_nothing_and_block_no_other_client(
    processes: Processes, make_actor: MakeActor
) -> None:
    there, server = processes.server(), processes.server()
    alice, bob = await make_actor("Alice", server.base), await make_actor("Bob", there.base)
    workspace = await alice.make_workspace(None, bob)
    hers, his = await alice.connect(workspace), await bob.connect(workspace)

    async def garbage(frames: int) -> None:
        sent = 0
        while sent < frames:
            socket = await alice.connect()
            try:
                while sent < frames:
                    await socket.raw.send_bytes(os.urandom(20) if sent % 2 else b'{"event":')
                    sent += 1
                    if sent % 40 == 0:
                        await socket.next()
            except (Closed, aiohttp.ClientError, ConnectionError):
                pass
            await socket.close()

    await garbage(500)
    before = footprint(server.pid)
    sending = asyncio.create_task(garbage(10_000))
    for number in itertools.count():
        if sending.done():
            break
        await change_and_wait(his, hers, workspace, number)
    await sending
    async with asyncio.timeout(WAIT_TIMEOUT_SECONDS):  # until the closing sockets have ended
        while (after := footprint(server.pid))[1] > before[1] + 3:
            await asyncio.sleep(0.1)
    assert after[0] - before[0] < 20 << 20, "memory"
    await (await alice.connect()).push("ping")


def footprint(pid: int) -> tuple[int, int]:
    """Return the resident bytes and the number of open file descriptors of a process."""
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE"), len([*Path(f"/proc/{pid}/fd").iterdir()])
