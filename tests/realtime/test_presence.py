"""Presence counts users, not sockets, over all processes, and expires with the lease of a killed process."""

import asyncio
from typing import Any

from tests.actors import Actor
from tests.conftest import MakeActor
from tests.processes import Processes
from tests.timeouts import WAIT_TIMEOUT_SECONDS


def shown(users: list[dict[str, Any]]) -> dict[str, int]:
    return {user["userName"]: user["connections"] for user in users}


async def online(actor: Actor, workspace: str) -> dict[str, int]:
    return shown((await actor.get(f"/workspaces/{workspace}/users"))["items"])


async def test_user_with_several_sockets_joins_and_leaves_once(alice: Actor, bob: Actor) -> None:
    workspace = await alice.make_workspace(None, bob)
    hers = await alice.connect(workspace)
    desk = await bob.connect(workspace)
    await hers.assert_push("USER_JOIN", userId=bob.id, userName="Bob")
    phone = await bob.connect(workspace)
    assert shown(phone.joined["users"]) == {"Alice": 1, "Bob": 2}
    assert await online(alice, workspace) == {"Alice": 1, "Bob": 2}
    await desk.close()
    await hers.refute_push()
    await phone.close()
    left = await hers.assert_push("USER_LEAVE", userId=bob.id, userName="Bob", workspaceId=workspace)
    assert "eventId" not in left
    assert await online(alice, workspace) == {"Alice": 1}


async def test_user_does_not_receive_own_join(alice: Actor) -> None:
    workspace = await alice.make_workspace()
    first, second = await alice.connect(workspace), await alice.connect(workspace)
    await first.refute_push()
    await second.refute_push()


async def test_aborted_connection_leaves(alice: Actor, bob: Actor) -> None:
    workspace = await alice.make_workspace(None, bob)
    hers, his = await alice.connect(workspace), await bob.connect(workspace)
    await hers.assert_push("USER_JOIN")
    his.abort()
    await hers.assert_push("USER_LEAVE", userId=bob.id)


async def test_repeated_leave_and_join_without_waiting_keep_their_order(alice: Actor, bob: Actor) -> None:
    workspace = await alice.make_workspace(None, bob)
    hers, his = await alice.connect(workspace), await bob.connect(workspace)
    for _ in range(30):
        await his.send("leave:workspace", {"workspaceId": workspace})
        await his.send("join:workspace", {"workspaceId": workspace})
    await his.push("ping")
    assert await online(alice, workspace) == {"Alice": 1, "Bob": 1}
    events = [(await hers.next())["data"]["type"] for _ in range(61)]
    assert events == ["USER_JOIN", *["USER_LEAVE", "USER_JOIN"] * 30]
    await his.push("leave:workspace", workspaceId=workspace)
    assert await online(alice, workspace) == {"Alice": 1}


async def test_online_users_are_paginated(alice: Actor, bob: Actor, carol: Actor) -> None:
    workspace = await alice.make_workspace(None, bob, carol)
    for actor in (alice, bob, carol):
        await actor.connect(workspace)
    seen, cursor = [], ""
    for _ in range(3):
        page = await alice.get(f"/workspaces/{workspace}/users?limit=1{cursor}")
        seen += [user["userId"] for user in page["items"]]
        cursor = f"&cursor={page['nextCursor']}"
    assert page["nextCursor"] is None
    assert sorted(seen) == sorted([alice.id, bob.id, carol.id])


async def test_presence_is_the_same_across_processes(processes: Processes, make_actor: MakeActor) -> None:
    here, there = [server.base for server in (processes.server(), processes.server())]
    alice, bob = await make_actor("Alice", here), await make_actor("Bob", there)
    workspace = await alice.make_workspace(None, bob)
    hers = await alice.connect(workspace)
    desk = await bob.connect(workspace)
    await hers.assert_push("USER_JOIN", userId=bob.id)
    phone = await bob.at(here).connect(workspace)
    assert shown(phone.joined["users"]) == {"Alice": 1, "Bob": 2}
    await desk.close()
    await hers.refute_push()
    await phone.close()
    await hers.assert_push("USER_LEAVE", userId=bob.id)


async def test_killed_process_leaves_no_stale_presence(processes: Processes, make_actor: MakeActor) -> None:
    surviving, doomed = processes.server(), processes.server()
    alice, bob, carol = [await make_actor(name, surviving.base) for name in ("Alice", "Bob", "Carol")]
    workspace = await alice.make_workspace(None, bob, carol)
    hers = await alice.connect(workspace)
    await bob.at(doomed.base).connect(workspace)
    await hers.assert_push("USER_JOIN", userId=bob.id)
    await carol.connect(workspace)
    await carol.at(doomed.base).connect(workspace)
    await hers.assert_push("USER_JOIN", userId=carol.id)
    doomed.kill()
    await hers.assert_push("USER_LEAVE", userId=bob.id)
    await hers.refute_push()  # Carol has another socket, on the surviving process
    assert await online(alice, workspace) == {"Alice": 1, "Carol": 1}


async def test_concurrent_joins_and_leaves_keep_the_count_right(processes: Processes, make_actor: MakeActor) -> None:
    bases = [server.base for server in (processes.server(), processes.server())]
    alice, bob = await make_actor("Alice", bases[0]), await make_actor("Bob", bases[1])
    workspace = await alice.make_workspace(None, bob)
    hers = await alice.connect(workspace)

    slots = asyncio.Semaphore(6)  # on a busy machine, more would exceed the deadline of PostgreSQL

    async def join_and_leave(number: int) -> None:
        async with slots:
            socket = await bob.at(bases[number % 2]).connect(workspace)
            if number % 3:
                await socket.close()
            else:
                socket.abort()

    await asyncio.gather(*map(join_and_leave, range(30)))
    async with asyncio.timeout(WAIT_TIMEOUT_SECONDS):
        while await online(alice, workspace) != {"Alice": 1}:
            await asyncio.sleep(0.05)
    await (await alice.connect(workspace)).push("file:change", workspaceId=workspace, change="the end")
    events = []
    while (type := (await hers.next())["data"]["type"]) != "FILE_CHANGE":
        events.append(type)
    assert events == ["USER_JOIN", "USER_LEAVE"] * (len(events) // 2)
    assert events
