"""What is said to one who speaks: every frame with an id is answered once; bad ones harm nobody."""

import asyncio
import itertools
import os
import time
from pathlib import Path

import aiohttp
import orjson
import pytest

from server.realtime.endpoint import REFUSAL_PAUSE_SECONDS
from tests.actors import Actor
from tests.conftest import MakeActor, MakeServer
from tests.patience import PATIENCE_SECONDS
from tests.processes import Processes
from tests.sockets import Closed, Refused, Socket


async def heard(socket: Socket, text: str) -> dict[str, object]:
    await socket.raw.send_str(text)
    return await socket.next()


async def test_every_frame_with_an_id_is_answered_once(alice: Actor) -> None:
    socket = await alice.connect()
    for id in ("a", 7, 7.5, 0, ""):
        await socket.send("ping", {}, id=id)
        answer = await socket.next()
        assert (answer["event"], answer["id"]) == ("ack", id)
    await socket.send("ping")
    await socket.refute_push()


async def test_what_is_malformed_gets_an_error_and_life_goes_on(alice: Actor) -> None:
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
        answer = await heard(socket, text)
        assert answer["event"] == "error", text
        assert answer["data"]["code"] == "malformed", text  # type: ignore[index]
    await socket.raw.send_bytes(b"\0\1")
    assert (await socket.next())["data"]["code"] == "malformed"
    await socket.push("ping")


async def test_a_malformed_frame_with_an_id_is_answered_with_it(alice: Actor) -> None:
    answer = await heard(await alice.connect(), '{"event": "ping", "data": 1, "id": "x"}')
    assert answer["id"] == "x"


async def test_an_unknown_event_and_bad_data_are_told_apart(alice: Actor) -> None:
    socket = await alice.connect()
    with pytest.raises(Refused, match="unknown_event"):
        await socket.push("nonsense")
    with pytest.raises(Refused, match="validation_failed") as refused:
        await socket.push("join:workspace", workspaceId="nonsense", sinc=1)
    assert {each["field"] for each in refused.value.data["details"]} == {"workspaceId", "sinc"}
    with pytest.raises(Refused, match="validation_failed"):
        await socket.push("ping", unknown=1)


async def test_a_frame_may_be_as_large_as_is_said_and_no_larger(alice: Actor, bob: Actor) -> None:
    workspace = await alice.make_workspace(None, bob)
    hers, his = await alice.connect(workspace), await bob.connect(workspace)
    largest = "x" * (hers.welcome["maxMessageBytes"] - 200)
    await hers.push("file:change", workspaceId=workspace, change=largest)
    assert (await his.assert_push("FILE_CHANGE"))["change"] == largest
    await hers.assert_push("USER_JOIN")
    await hers.send("file:change", {"workspaceId": workspace, "change": largest + "x" * 400}, id=9)
    assert await hers.closed() == 1009


async def test_frames_over_the_rate_are_refused_with_their_id(make_server: MakeServer, make_actor: MakeActor) -> None:
    alice = await make_actor("Alice", await make_server(ws_frames_per_second=1, ws_burst=20))
    socket = await alice.connect()
    for id in range(40):
        await socket.send("ping", {}, id=id)
    answers = [await socket.next() for _ in range(40)]
    assert [answer["id"] for answer in answers] == [*range(40)]
    refused = [answer["id"] for answer in answers if answer["event"] == "error"]
    assert 10 <= len(refused) <= 20
    assert {answer["data"]["code"] for answer in answers if answer["event"] == "error"} == {"rate_limited"}
    await asyncio.sleep(1.5)
    await socket.push("ping")


async def test_who_sends_garbage_is_sent_away(alice: Actor, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("server.realtime.throttle.PATIENCE_SECONDS", 600.0)
    socket = await alice.connect()
    for _ in range(49):
        assert (await heard(socket, "garbage"))["event"] == "error"
    await socket.push("ping")
    await socket.raw.send_str("garbage")
    assert await socket.closed() == 4400


async def test_who_floods_is_sent_away_after_ten_seconds_and_not_before(
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


async def test_a_flood_is_read_slowly_and_delays_nobody_else(processes: Processes, make_actor: MakeActor) -> None:
    there, here = processes.server(), processes.server()
    alice = await make_actor("Alice", there.base)
    bob, mallory = [await make_actor(name, here.base) for name in ("Bob", "Mallory")]
    workspace = await alice.make_workspace(None, bob, mallory)
    hers, his, evil = [await each.connect(workspace) for each in (alice, bob, mallory)]
    answers = 0

    async def flood() -> None:
        change = {"workspaceId": workspace, "change": 1}
        frame = orjson.dumps({"event": "file:change", "data": change, "id": 1}).decode()
        while not evil.raw.closed:
            for _ in range(100):
                await evil.raw.send_str(frame)
            await asyncio.sleep(0)

    async def drain() -> None:
        nonlocal answers
        while not evil.raw.closed:
            answers += '"id":1' in str((await evil.raw.receive()).data)

    before, began = footprint(here.pid), time.monotonic()
    noise = [asyncio.create_task(flood()), asyncio.create_task(drain())]
    for number in range(60):
        await tell(hers, his, workspace, number)
    after, seconds = footprint(here.pid), time.monotonic() - began
    for task in noise:
        task.cancel()
    await asyncio.gather(*noise, return_exceptions=True)
    evil.cut()
    # As many as the limits of a server let through, and a refusal after each pause.
    assert answers <= 200 + seconds * (100 + 1 / REFUSAL_PAUSE_SECONDS)
    assert after[1] <= before[1] + 3, "file descriptors"
    assert after[0] - before[0] < 40 << 20, "memory"


async def tell(hers: Socket, his: Socket, workspace: str, number: int) -> None:
    """Returns when he has heard what she says, and after a pause."""
    await hers.push("file:change", workspaceId=workspace, change=["told", number])
    while (await his.next())["data"].get("change") != ["told", number]:
        pass
    await asyncio.sleep(0.03)


async def test_ten_thousand_malformed_frames_leak_nothing_and_stop_nobody(
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
        await tell(his, hers, workspace, number)
    await sending
    async with asyncio.timeout(PATIENCE_SECONDS):  # for closing sockets to end
        while (after := footprint(server.pid))[1] > before[1] + 3:
            await asyncio.sleep(0.1)
    assert after[0] - before[0] < 20 << 20, "memory"
    await (await alice.connect()).push("ping")


def footprint(pid: int) -> tuple[int, int]:
    """Resident bytes and open file descriptors."""
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE"), len([*Path(f"/proc/{pid}/fd").iterdir()])
