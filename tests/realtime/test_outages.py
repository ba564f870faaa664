"""Redis outages: down, silent or slow. Revoked access stays revoked, and all other members resync."""

import asyncio
import contextlib
from collections.abc import AsyncIterator
from typing import Any
from uuid import UUID

import psycopg
import pytest

from server.devstack.stack import Stack
from server.errors import Unavailable
from server.realtime.access_monitor import AccessMonitor
from server.realtime.background import run_forever
from server.realtime.hub import Realtime
from server.realtime.presence import PresenceRegistry
from server.realtime.subscriber import Subscriber
from server.resources import blocking_redis_client, redis_client
from tests.actors import Actor
from tests.conftest import MakeActor, MakeServer
from tests.faults import FaultyNetwork, Mode, Proxy
from tests.realtime.test_access import collaborator
from tests.realtime.test_presence import online
from tests.sockets import ErrorReply, SocketClient
from tests.timeouts import WAIT_TIMEOUT_SECONDS


@pytest.fixture
async def network(stack: Stack) -> AsyncIterator[FaultyNetwork]:
    async with FaultyNetwork.start({"redis_url": stack.valkey.url}) as network:
        yield network


@pytest.fixture
async def redis(network: FaultyNetwork) -> Proxy:
    """The proxy between the server ``proxied_server`` and its Redis."""
    return network.stores["redis_url"]


@pytest.fixture
async def proxied_server(
    request: pytest.FixtureRequest, network: FaultyNetwork, make_server: MakeServer, monkeypatch: pytest.MonkeyPatch
) -> str:
    """A server whose Redis may fail; in tests in which it does, short timeouts, so that it detects the failure soon."""
    monkeypatch.setattr("server.realtime.hub.RENEW_INTERVAL_SECONDS", 0.3)
    if "redis" in request.fixturenames:
        monkeypatch.setattr("server.realtime.room.MARKER_TIMEOUT_SECONDS", 0.5)
        monkeypatch.setattr("server.realtime.subscriber.SUBSCRIBE_TIMEOUT_SECONDS", 0.5)
        monkeypatch.setattr("server.realtime.subscriber.PING_INTERVAL_SECONDS", 0.5)
    return await make_server(**network.urls)


Scenario = tuple[Actor, Actor, str]


@pytest.fixture
async def scenario(server: str, proxied_server: str, make_actor: MakeActor) -> Scenario:
    """Alice, Bob on the server that may lose Redis, and a project of both."""
    alice, bob = await make_actor("Alice", server), await make_actor("Bob", proxied_server)
    return alice, bob, await alice.make_project(bob)


async def resynced(socket: SocketClient) -> dict[str, Any]:
    while (frame := await socket.next())["event"] != "workspace:resync":
        pass
    return frame["data"]


async def test_member_whose_rejoin_failed_is_out_of_the_room(scenario: Scenario, redis: Proxy) -> None:
    alice, bob, project = scenario
    workspace = await alice.make_workspace(project)
    his, other = await bob.connect(workspace), await bob.connect(workspace)
    since = his.joined["lastEventId"]
    await redis.set_mode(Mode.STOPPED)
    await asyncio.sleep(0.2)  # until the server detects it
    with pytest.raises(ErrorReply, match="unavailable"):
        await his.push("join:workspace", workspaceId=workspace, since=since)
    with pytest.raises(ErrorReply, match="not_joined"):
        await his.push("cursor:update", workspaceId=workspace, position=1)
    await redis.set_mode(Mode.PASS)
    await resynced(other)
    his.received.clear()
    await (await alice.connect(workspace)).push("file:change", workspaceId=workspace, change="secret")
    assert (await alice.delete(await collaborator(alice, bob, project))).status == 204
    while (await other.next())["data"].get("type") != "ACCESS_REVOKED":
        pass
    await his.refute_push()
    assert await online(alice, workspace) == {"Alice": 1}


async def test_no_event_is_delivered_before_access_is_rechecked(
    scenario: Scenario, redis: Proxy, database_url: str
) -> None:
    alice, bob, project = scenario
    workspace = await alice.make_workspace(project)
    hers, his = await alice.connect(workspace), await bob.connect(workspace)
    path = await collaborator(alice, bob, project)
    await redis.set_mode(Mode.STOPPED)
    assert (await alice.delete(path)).status == 204
    with psycopg.connect(database_url) as connection:
        connection.execute("LOCK TABLE sessions")  # blocks every recheck
        await redis.set_mode(Mode.PASS)
        for _ in range(20):
            await hers.push("file:change", workspaceId=workspace, change="secret")
            await asyncio.sleep(0.1)
    await his.assert_push("ACCESS_REVOKED", workspaceId=workspace)
    await his.refute_push()


async def test_access_read_before_a_reconnect_is_rechecked_after_it() -> None:
    """A notice may be missed between the read of access in PostgreSQL and the join."""

    async def never(*_: Any) -> Any:
        raise AssertionError

    monitor = AccessMonitor({}, never)
    epoch = monitor.epoch
    await monitor.recheck_all()
    assert monitor.epoch != epoch


async def test_sockets_survive_a_silent_redis(scenario: Scenario, redis: Proxy) -> None:
    alice, bob, project = scenario
    workspace = await alice.make_workspace(project)
    hers, his = await alice.connect(workspace), await bob.connect(workspace)
    await redis.set_mode(Mode.BLACK_HOLE)
    for event, data in (("file:change", {"change": 1}), ("join:workspace", {"since": his.joined["lastEventId"]})):
        with pytest.raises(ErrorReply, match="unavailable"):
            await his.push(event, workspaceId=workspace, **data)
    assert (await his.push("ping")).keys() == {"serverTime"}
    late = await bob.connect()  # succeeds without Redis
    await redis.set_mode(Mode.PASS)
    async with asyncio.timeout(WAIT_TIMEOUT_SECONDS):
        while not late.joined:
            with contextlib.suppress(ErrorReply):
                late.joined = await late.push("join:workspace", workspaceId=workspace)
    await hers.push("file:change", workspaceId=workspace, change="again")
    await late.assert_push("FILE_CHANGE", change="again")


@pytest.mark.parametrize(
    ("mode", "message"),
    [(Mode.BLACK_HOLE, "Redis did not answer in time"), (Mode.STOPPED, "Redis is unavailable")],
    ids=["silent", "stopped"],
)
async def test_rejected_join_says_whether_redis_is_slow_or_down(
    mode: Mode, message: str, scenario: Scenario, redis: Proxy
) -> None:
    """The message is right from the start: before the silence is detected, and after the connection is closed."""
    alice, bob, project = scenario
    workspace = await alice.make_workspace(project)
    his = await bob.connect()
    await redis.set_mode(mode)
    for _ in range(3):
        with pytest.raises(ErrorReply) as rejected:
            await his.push("join:workspace", workspaceId=workspace)
        assert (rejected.value.code, rejected.value.data["message"]) == ("unavailable", message)


async def test_welcome_comes_before_any_other_push(
    network: FaultyNetwork, redis: Proxy, make_actor: MakeActor, make_server: MakeServer
) -> None:
    base = await make_server(**network.urls, access_token_ttl=40)
    alice = await make_actor("Alice", base)
    await redis.set_mode(Mode.STOPPED)
    async with alice.http.ws_connect(f"{base}/ws", headers=alice.headers) as raw:
        socket = SocketClient(raw)
        await socket.assert_push("welcome")
        await socket.assert_push("token:expiring")


async def test_room_that_cannot_resync_does_not_interrupt_other_rooms(
    scenario: Scenario, redis: Proxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    alice, bob, project = scenario
    bad, good = [await alice.make_workspace(project) for _ in range(2)]
    restore = Realtime._restore_presence

    async def fail(self: Realtime, room: Any, mark: str) -> Any:
        if str(room.workspace) == bad:
            raise Unavailable("This room alone")
        return await restore(self, room, mark)

    monkeypatch.setattr(Realtime, "_restore_presence", fail)
    his = await bob.connect(bad)
    await his.push("join:workspace", workspaceId=good)
    await redis.set_mode(Mode.STOPPED)
    await redis.set_mode(Mode.PASS)
    assert (await resynced(his))["workspaceId"] == good
    connections = redis.connections
    await his.refute_push(seconds=1)
    assert redis.connections <= connections + 1, "the failure causes no reconnect"


async def test_room_is_resynced_once_by_subscriber_or_lease_renewal(
    scenario: Scenario, redis: Proxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both the subscriber and the renewal of leases start a resync: the second while the first one waits."""
    alice, bob, project = scenario
    workspace = await alice.make_workspace(project)
    his = await bob.connect(workspace)
    wait_confirmed, renewed = Subscriber._wait_confirmed, asyncio.Event()
    renew = Realtime._renew_leases

    async def wait_for_renewal(self: Subscriber, channel: bytes) -> None:
        await asyncio.wait_for(renewed.wait(), WAIT_TIMEOUT_SECONDS)
        await wait_confirmed(self, channel)

    async def renew_meanwhile(self: Realtime) -> None:
        if redis.mode is Mode.PASS and any(room.needs_resync for room in self._rooms.values()):
            asyncio.get_running_loop().call_later(0.1, renewed.set)
        await renew(self)

    monkeypatch.setattr(Subscriber, "_wait_confirmed", wait_for_renewal)
    monkeypatch.setattr(Realtime, "_renew_leases", renew_meanwhile)
    await redis.set_mode(Mode.STOPPED)
    await redis.set_mode(Mode.PASS)
    await resynced(his)
    await his.refute_push()


# Presence


async def test_presence_returns_after_an_expired_lease_although_a_connection_joined(
    scenario: Scenario, stack: Stack
) -> None:
    """The lease expires as if the process had been stopped for longer than the lease."""
    alice, bob, project = scenario
    workspace = await alice.make_workspace(project)
    await bob.connect(workspace)
    direct = redis_client(stack.valkey.url)
    leases = f"ws:{{{workspace}}}:leases"
    await direct.zadd(leases, dict.fromkeys(await direct.zrange(leases, 0, -1), 1))
    await direct.aclose()
    assert await online(alice, workspace) in ({}, {"Bob": 1}), "removed, unless its renewal came first"
    await bob.connect(workspace)
    async with asyncio.timeout(WAIT_TIMEOUT_SECONDS):
        while await online(alice, workspace) != {"Bob": 2}:
            await asyncio.sleep(0.05)


async def test_user_who_leaves_during_a_restore_leaves_no_stale_presence(
    scenario: Scenario, redis: Proxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    alice, bob, project = scenario
    workspace = await alice.make_workspace(project)
    restore, left = PresenceRegistry.restore, False

    async def restore_after_leave(self: PresenceRegistry, workspace_id: UUID, members: Any, **more: Any) -> Any:
        nonlocal left
        if not left:
            left = True
            leaving.abort()
            while await online(alice, workspace) != {"Bob": 1}:
                await asyncio.sleep(0.01)
        return await restore(self, workspace_id, members, **more)

    monkeypatch.setattr(PresenceRegistry, "restore", restore_after_leave)
    staying, leaving = await bob.connect(workspace), await bob.connect(workspace)
    await redis.set_mode(Mode.STOPPED)
    await redis.set_mode(Mode.PASS)
    await resynced(staying)
    async with asyncio.timeout(WAIT_TIMEOUT_SECONDS):
        while await online(alice, workspace) != {"Bob": 1}:
            await asyncio.sleep(0.05)


# Subscriptions


async def test_subscriptions_end_with_the_last_connection(alice: Actor, bob: Actor, stack: Stack) -> None:
    workspace = await alice.make_workspace(None, bob)
    channels = [f"ws:{workspace}", f"user:{alice.id}", f"user:{bob.id}"]
    direct = redis_client(stack.valkey.url)

    async def subscribers() -> list[int]:
        return [count for _, count in await direct.pubsub_numsub(*channels)]

    for _ in range(3):
        opened = [await actor.connect(workspace) for actor in (alice, bob, bob)]
        assert await subscribers() == [1, 1, 1]
        opened[0].abort()
        for socket in opened[1:]:
            await socket.close()
    async with asyncio.timeout(WAIT_TIMEOUT_SECONDS):
        while await subscribers() != [0, 0, 0]:
            await asyncio.sleep(0.05)
    await direct.aclose()


class FailingListener:
    def deliver(self, *_: Any) -> None:
        return

    on_disconnect = deliver

    async def resync(self) -> None:
        return


async def test_connection_to_redis_without_a_handshake_times_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("server.realtime.subscriber.SUBSCRIBE_TIMEOUT_SECONDS", 0.1)
    attempts = 0

    async def stay_silent(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal attempts
        attempts += 1
        await reader.read()
        writer.close()

    async def recheck_all() -> None:
        return

    silent = await asyncio.start_server(stay_silent, "127.0.0.1", 0)
    port = silent.sockets[0].getsockname()[1]
    redis = blocking_redis_client(f"redis://127.0.0.1:{port}/0")
    listening = asyncio.create_task(
        Subscriber(redis, channel="c", control=FailingListener(), recheck_all=recheck_all).listen()
    )
    async with asyncio.timeout(WAIT_TIMEOUT_SECONDS):
        while attempts < 3:
            await asyncio.sleep(0.02)
    listening.cancel()
    await asyncio.gather(listening, return_exceptions=True)
    await redis.aclose()
    silent.close()


async def test_background_task_restarts_after_an_unexpected_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("server.realtime.background.RESTART_DELAY_SECONDS", 0.01)
    runs = 0
    restarted = asyncio.Event()

    async def failing_twice() -> None:
        nonlocal runs
        runs += 1
        if runs < 3:
            raise ZeroDivisionError
        restarted.set()
        await asyncio.Event().wait()

    task = asyncio.create_task(run_forever(failing_twice))
    await asyncio.wait_for(restarted.wait(), WAIT_TIMEOUT_SECONDS)
    task.cancel()
    assert isinstance((await asyncio.gather(task, return_exceptions=True))[0], asyncio.CancelledError)
