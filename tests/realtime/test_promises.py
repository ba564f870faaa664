"""Delivery guarantees with real processes and a real Valkey.

Events arrive in order and exactly once; clients resume after disconnects, deploys and Redis outages.
"""

import asyncio
import contextlib
import random
import shutil
import signal

import aiohttp
import pytest

from server.devstack.stack import Stack
from server.realtime.history import event_id_key
from tests.conftest import TEST_SETTINGS, MakeActor
from tests.processes import Processes
from tests.realtime.clients import ReconnectingClient, ReconnectingWriter, assert_ordered_and_once
from tests.sockets import SocketClient
from tests.timeouts import WAIT_TIMEOUT_SECONDS

FAST = {"WS_FRAMES_PER_SECOND": "10000", "WS_BURST": "10000"}


async def test_all_members_receive_every_event_once_in_the_same_order(
    processes: Processes, make_actor: MakeActor, full: bool
) -> None:
    """Two writers and four readers over two processes."""
    bases = [server.base for server in (processes.server(**FAST), processes.server(**FAST))]
    names = ("Ada", "Bob", "Carol", "Dan", "Eve", "Fay")
    people = [await make_actor(name, bases[number % 2]) for number, name in enumerate(names)]
    workspace = await people[0].make_workspace(None, *people[1:])
    writers = [ReconnectingWriter(person, workspace, [person.base]) for person in people[:2]]
    readers = [ReconnectingClient(person, workspace, [person.base]) for person in people[2:]]
    count = 5000 if full else 500
    for reader in readers:
        await reader.__aenter__()
    await asyncio.gather(*(writer.write([[number, i] for i in range(count)]) for number, writer in enumerate(writers)))
    acknowledged = {**writers[0].acknowledged, **writers[1].acknowledged}
    for reader in readers:
        await reader.wait_for_change([0, count - 1])
        await reader.wait_for_change([1, count - 1])
        await reader.__aexit__()
    expected = sorted(acknowledged, key=event_id_key)
    for reader in readers:
        assert reader.ids == expected
        assert reader.changes == [acknowledged[id] for id in expected]


async def test_client_aborted_at_random_misses_no_event(
    processes: Processes, make_actor: MakeActor, full: bool
) -> None:
    bases = [server.base for server in (processes.server(**FAST), processes.server(**FAST))]
    alice, bob, carol = [await make_actor(name, bases[0]) for name in ("Alice", "Bob", "Carol")]
    workspace = await alice.make_workspace(None, bob, carol)
    count = 3000 if full else 400
    async with (
        ReconnectingClient(bob, workspace, bases) as first,
        ReconnectingClient(carol, workspace, bases) as second,
    ):
        writer = ReconnectingWriter(alice, workspace, bases)
        writing = asyncio.create_task(writer.write(range(count), pause=0.003))
        while not writing.done():
            await asyncio.sleep(random.uniform(0.05, 0.3))
            random.choice([first, second]).abort()
        await writing
        for member in (first, second):
            await member.wait_for_change(count - 1)
            assert_ordered_and_once(member)
            assert member.changes == [*range(count)]
            assert member.gaps == 0
            assert member.reconnects >= 1


async def test_ack_keeps_its_place_in_the_order_of_events(processes: Processes, make_actor: MakeActor) -> None:
    """An ack follows all earlier events, so resuming from its id, or from the last id of a join, misses nothing."""
    bases = [server.base for server in (processes.server(**FAST), processes.server(**FAST))]
    alice, bob = await make_actor("Alice", bases[0]), await make_actor("Bob", bases[1])
    workspace = await alice.make_workspace(None, bob)
    others = [ReconnectingWriter(bob, workspace, [bases[1]]) for _ in range(2)]
    hers = await alice.connect(workspace)
    writing = asyncio.gather(*(other.write(range(200)) for other in others))
    received, acks = [], []
    while not writing.done():
        event, more = ("join:workspace", {}) if len(acks) % 2 else ("file:change", {"change": "hers"})
        await hers.send(event, {"workspaceId": workspace, **more}, id=len(acks))
        while (frame := await hers.next())["event"] != "ack":
            received += [frame["data"]["eventId"]] if "eventId" in frame["data"] else []
        ack = frame["data"]
        acks.append((event_id_key(ack.get("eventId") or ack["lastEventId"]), len(received)))
    await writing
    all_ids = sorted(event_id_key(id) for other in others for id in other.acknowledged)
    for ack, count in acks:
        assert count >= sum(id <= ack for id in all_ids)


async def test_drain_under_load_loses_no_event(processes: Processes, make_actor: MakeActor) -> None:
    stopping, staying = processes.server(DRAIN_SECONDS="5"), processes.server()
    alice, bob = await make_actor("Alice", staying.base), await make_actor("Bob", staying.base)
    workspace = await alice.make_workspace(None, bob)
    both = [stopping.base, staying.base]
    member = ReconnectingClient(bob, workspace, [stopping.base])
    async with member:
        member.bases = both
        writer = ReconnectingWriter(alice, workspace, [stopping.base])
        writing = asyncio.create_task(writer.write(range(400), pause=0.01))
        await member.wait_for_change(20)
        writer.bases = both
        assert await asyncio.to_thread(stopping.terminate) == 0
        await writing
        await member.wait_for_change(399)
        assert_ordered_and_once(member)
        assert member.reconnects >= 1
        assert member.gaps == 0
        assert {*writer.acknowledged} <= {*member.ids}
        assert member.changes == [*range(400)], "nothing lost, and nothing written twice: each ack arrived"


async def test_graceful_shutdown_announces_draining_and_closes_with_1012(
    processes: Processes, make_actor: MakeActor
) -> None:
    server = processes.server(DRAIN_SECONDS="3")
    alice = await make_actor("Alice", server.base)
    sockets = [await alice.connect() for _ in range(3)]
    unauthenticated = SocketClient(await alice.http.ws_connect(f"{server.base}/ws"))
    server._process.send_signal(signal.SIGTERM)
    assert await unauthenticated.closed() == 1012
    for socket in sockets:
        draining = await socket.assert_push("server:draining")
        assert 0 <= draining["reconnectAfterMs"] <= 3000
    assert (await alice.get("/health/ready")).status == 503
    rejected = await alice.get("/ws", headers={"Connection": "Upgrade", "Upgrade": "websocket"})
    assert (rejected.status, rejected.code) == (503, "unavailable")
    assert [await socket.closed() for socket in sockets] == [1012] * 3
    assert await asyncio.to_thread(server.wait) == 0


async def test_token_in_a_rejected_upgrade_is_not_logged(processes: Processes, make_actor: MakeActor) -> None:
    server = processes.server()
    alice = await make_actor("Alice", server.base)
    offered = [f"bearer.{alice.access_token}"]
    for options in ({}, {"headers": alice.headers}):
        for path in ("ws", f"yjs/{alice.id}"):
            with contextlib.suppress(aiohttp.WSServerHandshakeError):
                socket = await alice.http.ws_connect(f"{server.base}/{path}", protocols=offered, **options)
                await socket.close()
    assert alice.access_token.rpartition(".")[2] not in server.output


@pytest.fixture
def own_processes(own_stack: Stack, tmp_path_factory: pytest.TempPathFactory):  # type: ignore[no-untyped-def]
    with Processes(TEST_SETTINGS | own_stack.environment, tmp_path_factory.mktemp("own")) as running:
        yield running


async def test_valkey_restarted_under_load_loses_nothing_acknowledged(
    own_stack: Stack, own_processes: Processes, make_actor: MakeActor
) -> None:
    bases = [server.base for server in (own_processes.server(**FAST), own_processes.server(**FAST))]
    alice, bob, carol = [await make_actor(name, bases[n % 2]) for n, name in enumerate(("Alice", "Bob", "Carol"))]
    workspace = await alice.make_workspace(None, bob, carol)
    writer = ReconnectingWriter(alice, workspace, [bases[0]])
    async with (
        ReconnectingClient(bob, workspace, [bases[1]]) as here,
        ReconnectingClient(carol, workspace, [bases[0]]) as there,
    ):
        sockets = [here.socket, there.socket]
        stop = asyncio.Event()

        async def write() -> None:
            number = 0
            while not stop.is_set():
                await writer.write_one(number)
                number += 1
                await asyncio.sleep(0.002)

        writing = asyncio.create_task(write())
        await here.wait_for_change(100)
        own_stack.valkey.kill()
        await asyncio.sleep(1)
        await asyncio.to_thread(own_stack.valkey.start)
        before = len(here.events)
        async with asyncio.timeout(WAIT_TIMEOUT_SECONDS):  # until events flow again
            while len(here.events) <= before + 5 or len(there.events) <= before + 5:
                await asyncio.sleep(0.01)
        await asyncio.sleep(0.5)
        stop.set()
        await writing
        last = max(writer.acknowledged, key=event_id_key)
        for member, socket in ((here, sockets[0]), (there, sockets[1])):
            await member.wait_for_change(writer.acknowledged[last])
            assert member.socket is socket, "stayed connected"
            assert_ordered_and_once(member)
            assert {*writer.acknowledged} <= {*member.ids}
            assert "workspace:resync" in member.events_received
        users = (await alice.get(f"/workspaces/{workspace}/users"))["items"]
        assert {user["userName"]: user["connections"] for user in users} == {"Alice": 1, "Bob": 1, "Carol": 1}
        await writer.stop()


async def test_lost_data_of_valkey_is_announced_as_a_gap(
    own_stack: Stack, own_processes: Processes, make_actor: MakeActor
) -> None:
    bases = [server.base for server in (own_processes.server(), own_processes.server())]
    alice, bob = await make_actor("Alice", bases[0]), await make_actor("Bob", bases[1])
    workspace = await alice.make_workspace(None, bob)
    hers, his = await alice.connect(workspace), await bob.connect(workspace)
    await hers.push("file:change", workspaceId=workspace, change="before")
    await his.assert_push("FILE_CHANGE")
    own_stack.valkey.kill()
    shutil.rmtree(own_stack.valkey._data)
    await asyncio.to_thread(own_stack.valkey.start)
    for socket in (hers, his):
        while (frame := await socket.next())["event"] != "workspace:resync":
            pass
        assert frame["data"]["gap"] is True
    await asyncio.sleep(0.5)
    await hers.push("file:change", workspaceId=workspace, change="after")
    while (frame := await his.next())["data"].get("change") != "after":
        pass
    users = (await alice.get(f"/workspaces/{workspace}/users"))["items"]
    assert {user["userName"]: user["connections"] for user in users} == {"Alice": 1, "Bob": 1}


async def test_revocation_during_a_redis_outage_takes_effect_before_any_delivery(
    own_stack: Stack, own_processes: Processes, make_actor: MakeActor
) -> None:
    bases = [server.base for server in (own_processes.server(), own_processes.server())]
    alice, bob = await make_actor("Alice", bases[0]), await make_actor("Bob", bases[1])
    project = await alice.make_project(bob)
    workspace = await alice.make_workspace(project)
    his = await bob.connect(workspace)
    members = (await alice.get(f"/projects/{project}/collaborators"))["items"]
    member = next(member["id"] for member in members if member["user"]["id"] == bob.id)
    own_stack.valkey.kill()
    assert (await alice.delete(f"/projects/{project}/collaborators/{member}")).status == 204
    await asyncio.to_thread(own_stack.valkey.start)
    await his.assert_push("ACCESS_REVOKED", workspaceId=workspace)
    hers = await alice.connect(workspace)
    await hers.push("file:change", workspaceId=workspace, change="secret")
    await his.refute_push(seconds=1)
