"""Changes of access under an open socket take effect at once, on every process."""

import asyncio
from collections.abc import Awaitable, Callable

import psycopg
import pytest

from server.realtime.access_monitor import AccessMonitor
from tests.actors import Actor
from tests.conftest import MakeActor, MakeServer
from tests.processes import Processes
from tests.sockets import ErrorReply, wait_until_rejected

pytestmark = pytest.mark.usefixtures("no_periodic_recheck")

Pair = tuple[Actor, Actor]


@pytest.fixture(params=["one process", "two processes"])
async def pair(request: pytest.FixtureRequest, make_server: MakeServer, make_actor: MakeActor) -> Pair:
    """Alice, the owner of the test's resources, and Bob, on the same or another server."""
    here = await make_server()
    there = here if request.param == "one process" else await make_server()
    return await make_actor("Alice", here), await make_actor("Bob", there)


async def collaborator(alice: Actor, bob: Actor, project: str) -> str:
    members = (await alice.get(f"/projects/{project}/collaborators"))["items"]
    member = next(member["id"] for member in members if member["user"]["id"] == bob.id)
    return f"/projects/{project}/collaborators/{member}"


async def test_new_role_is_announced_and_takes_effect_at_once(pair: Pair) -> None:
    alice, bob = pair
    project = await alice.make_project(bob)
    workspace = await alice.make_workspace(project)
    his = await bob.connect(workspace)
    await his.push("file:change", workspaceId=workspace, change=1)
    await alice.patch(await collaborator(alice, bob, project), {"role": "VIEWER"})
    event = await his.assert_push("ROLE_CHANGED", subjectId=bob.id, role="VIEWER", userId=alice.id)
    assert event["userName"] == "Alice"
    assert event["eventId"]
    await wait_until_rejected(lambda: his.push("file:change", workspaceId=workspace, change=2), "forbidden")
    await his.push("cursor:update", workspaceId=workspace, position=1)
    await alice.patch(await collaborator(alice, bob, project), {"role": "COLLABORATOR"})
    await his.assert_push("ROLE_CHANGED", role="COLLABORATOR")
    await his.push("file:change", workspaceId=workspace, change=3)


async def test_removed_member_leaves_its_rooms_but_stays_connected(pair: Pair) -> None:
    alice, bob = pair
    project = await alice.make_project(bob)
    workspace, other = await alice.make_workspace(project), await bob.make_workspace()
    hers, his = await alice.connect(workspace), await bob.connect(workspace)
    await his.push("join:workspace", workspaceId=other)
    await hers.assert_push("USER_JOIN")
    await alice.delete(await collaborator(alice, bob, project))
    event = await his.assert_push("ACCESS_REVOKED", workspaceId=workspace, reason="removed")
    assert (event["userId"], "eventId" in event) == (alice.id, False)
    await hers.assert_push("USER_LEAVE", userId=bob.id)
    await hers.push("file:change", workspaceId=workspace, change="secret")
    await his.refute_push()
    for event, data in (("file:change", {"change": 1}), ("cursor:update", {"position": 1}), ("join:workspace", {})):
        with pytest.raises(ErrorReply, match="not_found"):
            await his.push(event, workspaceId=workspace, **data)
    await his.push("file:change", workspaceId=other, change="still here")


async def test_member_who_leaves_a_project_loses_access(pair: Pair) -> None:
    alice, bob = pair
    project = await alice.make_project(bob)
    his = await bob.connect(await alice.make_workspace(project))
    await bob.delete(await collaborator(alice, bob, project))
    await his.assert_push("ACCESS_REVOKED", reason="left", userId=bob.id)


async def test_transfer_announces_both_new_roles(pair: Pair) -> None:
    alice, bob = pair
    project = await alice.make_project(bob)
    workspace = await alice.make_workspace(project)
    his = await bob.connect(workspace)
    await alice.post(f"/projects/{project}/transfer", {"userId": bob.id})
    events = [await his.assert_push("ROLE_CHANGED") for _ in range(2)]
    assert {event["subjectId"]: event["role"] for event in events} == {alice.id: "COLLABORATOR", bob.id: "OWNER"}


async def test_all_members_leave_a_deleted_workspace(pair: Pair) -> None:
    alice, bob = pair
    workspace = await alice.make_workspace(None, bob)
    his = await bob.connect(workspace)
    await alice.delete(f"/workspaces/{workspace}")
    await his.assert_push("WORKSPACE_DELETED", userId=alice.id)
    await his.assert_push("ACCESS_REVOKED", reason="deleted")
    with pytest.raises(ErrorReply, match="not_found"):
        await his.push("file:change", workspaceId=workspace, change=1)


async def test_deleting_a_project_deletes_its_workspaces(pair: Pair) -> None:
    alice, bob = pair
    project = await alice.make_project(bob)
    workspace = await alice.make_workspace(project)
    his = await bob.connect(workspace)
    await alice.delete(f"/projects/{project}")
    await his.assert_push("WORKSPACE_DELETED")
    await his.assert_push("ACCESS_REVOKED")


async def test_changes_over_rest_are_broadcast(pair: Pair) -> None:
    alice, bob = pair
    project = await alice.make_project(bob)
    workspace = await alice.make_workspace(project)
    his = await bob.connect(workspace)
    await alice.patch(f"/workspaces/{workspace}", {"name": "Letters"})
    await his.assert_push("WORKSPACE_UPDATED", userId=alice.id, userName="Alice", workspaceId=workspace)
    await alice.patch(f"/projects/{project}", {"name": "Engines"})
    await his.assert_push("PROJECT_UPDATED", userId=alice.id, projectId=project)


async def end_by_logout(bob: Actor) -> None:
    await bob.post("/auth/logout")


async def end_by_deleting_the_account(bob: Actor) -> None:
    assert (await bob.delete("/auth/profile", {"password": bob.password})).status == 204


async def end_from_another_device(bob: Actor) -> None:
    await bob.at(bob.base).log_in()
    other = await bob.at(bob.base).log_in()
    assert (await other.delete("/auth/sessions")).status == 204


async def end_by_a_new_password(bob: Actor) -> None:
    other = await bob.at(bob.base).log_in()
    body = {"currentPassword": bob.password, "newPassword": bob.password + "x"}
    assert (await other.post("/auth/password", body)).status == 204


async def end_this_one_from_another_device(bob: Actor) -> None:
    other = await bob.at(bob.base).log_in()
    for session in (await other.get("/auth/sessions"))["items"]:
        if not session["current"]:
            assert (await other.delete(f"/auth/sessions/{session['id']}")).status == 204


async def end_by_a_stolen_refresh_token(bob: Actor) -> None:
    first = {"refreshToken": bob.refresh_token}
    second = {"refreshToken": (await bob.post("/auth/refresh", first))["refreshToken"]}
    await bob.post("/auth/refresh", second)
    assert (await bob.post("/auth/refresh", first)).code == "refresh_reused"


@pytest.mark.parametrize(
    "end",
    [
        end_by_logout,
        end_by_deleting_the_account,
        end_from_another_device,
        end_this_one_from_another_device,
        end_by_a_stolen_refresh_token,
        end_by_a_new_password,
    ],
)
async def test_ended_session_closes_its_sockets(pair: Pair, end: Callable[[Actor], Awaitable[None]]) -> None:
    alice, bob = pair
    workspace = await alice.make_workspace(None, bob)
    hers, his = await alice.connect(workspace), await bob.connect(workspace)
    await hers.assert_push("USER_JOIN")
    await end(bob.at(alice.base))
    assert await his.closed() == 4401
    await hers.assert_push("USER_LEAVE", userId=bob.id)


async def test_other_sessions_of_the_same_user_stay_connected(alice: Actor) -> None:
    other = await alice.at(alice.base).log_in()
    socket = await alice.connect()
    await other.post("/auth/logout")
    await socket.refute_push()
    await socket.push("ping")


async def test_recheck_finds_lost_access_without_a_notice_from_redis(
    make_server: MakeServer, make_actor: MakeActor, database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("server.realtime.access_monitor.RECHECK_INTERVAL_SECONDS", 0.5)
    monkeypatch.setattr("server.realtime.access_monitor.MAX_BATCH", 1)
    base = await make_server()
    alice, bob, carol = [await make_actor(name, base) for name in ("Alice", "Bob", "Carol")]
    workspace = await alice.make_workspace(None, bob, carol)
    his, hers = await bob.connect(workspace), await carol.connect(workspace)
    with psycopg.connect(database_url, autocommit=True) as connection:
        connection.execute("UPDATE members SET role = 'VIEWER' WHERE user_id = %s", [carol.id])
        connection.execute("DELETE FROM members WHERE user_id = %s", [bob.id])
        await his.assert_push("USER_JOIN")
        await his.assert_push("ACCESS_REVOKED", reason="removed", userId=None)
        await hers.assert_push("USER_LEAVE")
        await wait_until_rejected(lambda: hers.push("file:change", workspaceId=workspace, change=1), "forbidden")
        connection.execute("UPDATE sessions SET ended_at = now() WHERE user_id = %s", [bob.id])
        assert await his.closed() == 4401


async def test_recheck_continues_after_an_unexpected_error(
    make_server: MakeServer, make_actor: MakeActor, database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("server.realtime.access_monitor.RECHECK_INTERVAL_SECONDS", 0.2)
    rechecks, recheck_all = 0, AccessMonitor.recheck_all

    async def counting(self: AccessMonitor) -> None:
        nonlocal rechecks
        await recheck_all(self)
        rechecks += 1

    monkeypatch.setattr(AccessMonitor, "recheck_all", counting)
    base = await make_server()
    alice, bob = await make_actor("Alice", base), await make_actor("Bob", base)
    project = await alice.make_project(bob)
    his = await bob.connect(await alice.make_workspace(project))
    path = await collaborator(alice, bob, project)
    with psycopg.connect(database_url, autocommit=True) as connection:
        connection.execute("ALTER TABLE sessions RENAME TO elsewhere")
        try:
            await asyncio.sleep(0.6)
        finally:
            connection.execute("ALTER TABLE elsewhere RENAME TO sessions")
    monkeypatch.setattr("server.realtime.access_monitor.RECHECK_INTERVAL_SECONDS", 600.0)
    last = rechecks + 1
    while rechecks < last:  # else a periodic recheck may find the loss first, without the name of the user who did it
        await asyncio.sleep(0.05)
    assert (await alice.delete(path)).status == 204
    await his.assert_push("ACCESS_REVOKED", reason="removed", userName="Alice")


async def test_concurrent_removals_keep_their_reasons(pair: Pair) -> None:
    alice, bob = pair
    projects = [await alice.make_project(bob) for _ in range(2)]
    workspaces = [await alice.make_workspace(project) for project in projects]
    his = await bob.connect(workspaces[0])
    await his.push("join:workspace", workspaceId=workspaces[1])
    paths = [await collaborator(alice, bob, project) for project in projects]
    await asyncio.gather(alice.delete(paths[0]), bob.delete(paths[1]))
    events = [await his.assert_push("ACCESS_REVOKED") for _ in range(2)]
    reasons = {event["workspaceId"]: event["reason"] for event in events}
    assert reasons == {workspaces[0]: "removed", workspaces[1]: "left"}


async def test_lost_access_is_not_announced_before_the_notice_with_its_reason(
    server: str, make_actor: MakeActor, database_url: str
) -> None:
    """The loss is already in PostgreSQL when another loss of the same user is rechecked; its notice is on its way."""
    alice, bob = await make_actor("Alice", server), await make_actor("Bob", server)
    project, left = [await alice.make_project(bob) for _ in range(2)]
    workspace = await alice.make_workspace(project)
    his = await bob.connect(workspace)
    await his.push("join:workspace", workspaceId=await alice.make_workspace(left))
    with psycopg.connect(database_url, autocommit=True) as connection:
        connection.execute("DELETE FROM members WHERE project_id = %s AND user_id = %s", [left, bob.id])
    assert (await alice.delete(await collaborator(alice, bob, project))).status == 204
    await his.assert_push("ACCESS_REVOKED", workspaceId=workspace)
    await his.refute_push()


async def test_real_processes_publish_access_changes_to_each_other(processes: Processes, make_actor: MakeActor) -> None:
    here, there = [server.base for server in (processes.server(), processes.server())]
    alice, bob = await make_actor("Alice", here), await make_actor("Bob", there)
    project = await alice.make_project(bob)
    workspace = await alice.make_workspace(project)
    his = await bob.connect(workspace)
    await alice.patch(await collaborator(alice, bob, project), {"role": "VIEWER"})
    await his.assert_push("ROLE_CHANGED")
    await wait_until_rejected(lambda: his.push("file:change", workspaceId=workspace, change=2), "forbidden")
    await bob.at(here).post("/auth/logout")
    assert await his.closed() == 4401
