"""Access changes under an open socket: told at once, on whichever process it is."""

import asyncio
from collections.abc import Awaitable, Callable

import psycopg
import pytest

from server.realtime.standing import Standing
from tests.actors import Actor
from tests.conftest import MakeActor, MakeServer
from tests.processes import Processes
from tests.sockets import Refused, until_refused

pytestmark = pytest.mark.usefixtures("notices_alone")

Pair = tuple[Actor, Actor]


@pytest.fixture(params=["one process", "two processes"])
async def pair(request: pytest.FixtureRequest, make_server: MakeServer, make_actor: MakeActor) -> Pair:
    """Alice, who owns things, and Bob, who may be at another server."""
    here = await make_server()
    there = here if request.param == "one process" else await make_server()
    return await make_actor("Alice", here), await make_actor("Bob", there)


async def collaborator(alice: Actor, bob: Actor, project: str) -> str:
    members = (await alice.get(f"/projects/{project}/collaborators"))["items"]
    return next(f"/projects/{project}/collaborators/{each['id']}" for each in members if each["user"]["id"] == bob.id)


async def test_a_new_role_is_told_and_counts_at_once(pair: Pair) -> None:
    alice, bob = pair
    project = await alice.make_project(bob)
    workspace = await alice.make_workspace(project)
    his = await bob.connect(workspace)
    await his.push("file:change", workspaceId=workspace, change=1)
    await alice.patch(await collaborator(alice, bob, project), {"role": "VIEWER"})
    told = await his.assert_push("ROLE_CHANGED", subjectId=bob.id, role="VIEWER", userId=alice.id)
    assert told["userName"] == "Alice"
    assert told["eventId"]
    await until_refused(lambda: his.push("file:change", workspaceId=workspace, change=2), "forbidden")
    await his.push("cursor:update", workspaceId=workspace, position=1)
    await alice.patch(await collaborator(alice, bob, project), {"role": "COLLABORATOR"})
    await his.assert_push("ROLE_CHANGED", role="COLLABORATOR")
    await his.push("file:change", workspaceId=workspace, change=3)


async def test_who_is_removed_is_told_and_out_but_stays_connected(pair: Pair) -> None:
    alice, bob = pair
    project = await alice.make_project(bob)
    workspace, other = await alice.make_workspace(project), await bob.make_workspace()
    hers, his = await alice.connect(workspace), await bob.connect(workspace)
    await his.push("join:workspace", workspaceId=other)
    await hers.assert_push("USER_JOIN")
    await alice.delete(await collaborator(alice, bob, project))
    told = await his.assert_push("ACCESS_REVOKED", workspaceId=workspace, reason="removed")
    assert (told["userId"], "eventId" in told) == (alice.id, False)
    await hers.assert_push("USER_LEAVE", userId=bob.id)
    await hers.push("file:change", workspaceId=workspace, change="secret")
    await his.refute_push()
    for event, data in (("file:change", {"change": 1}), ("cursor:update", {"position": 1}), ("join:workspace", {})):
        with pytest.raises(Refused, match="not_found"):
            await his.push(event, workspaceId=workspace, **data)
    await his.push("file:change", workspaceId=other, change="still here")


async def test_who_leaves_is_out_too(pair: Pair) -> None:
    alice, bob = pair
    project = await alice.make_project(bob)
    his = await bob.connect(await alice.make_workspace(project))
    await bob.delete(await collaborator(alice, bob, project))
    await his.assert_push("ACCESS_REVOKED", reason="left", userId=bob.id)


async def test_a_transfer_tells_both_roles(pair: Pair) -> None:
    alice, bob = pair
    project = await alice.make_project(bob)
    workspace = await alice.make_workspace(project)
    his = await bob.connect(workspace)
    await alice.post(f"/projects/{project}/transfer", {"userId": bob.id})
    heard = [await his.assert_push("ROLE_CHANGED") for _ in range(2)]
    assert {each["subjectId"]: each["role"] for each in heard} == {alice.id: "COLLABORATOR", bob.id: "OWNER"}


async def test_a_deleted_workspace_is_left_by_all(pair: Pair) -> None:
    alice, bob = pair
    workspace = await alice.make_workspace(None, bob)
    his = await bob.connect(workspace)
    await alice.delete(f"/workspaces/{workspace}")
    await his.assert_push("WORKSPACE_DELETED", userId=alice.id)
    await his.assert_push("ACCESS_REVOKED", reason="deleted")
    with pytest.raises(Refused, match="not_found"):
        await his.push("file:change", workspaceId=workspace, change=1)


async def test_a_deleted_project_takes_its_workspaces_along(pair: Pair) -> None:
    alice, bob = pair
    project = await alice.make_project(bob)
    workspace = await alice.make_workspace(project)
    his = await bob.connect(workspace)
    await alice.delete(f"/projects/{project}")
    await his.assert_push("WORKSPACE_DELETED")
    await his.assert_push("ACCESS_REVOKED")


async def test_changes_over_rest_are_told(pair: Pair) -> None:
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
async def test_an_ended_session_closes_its_sockets(pair: Pair, end: Callable[[Actor], Awaitable[None]]) -> None:
    alice, bob = pair
    workspace = await alice.make_workspace(None, bob)
    hers, his = await alice.connect(workspace), await bob.connect(workspace)
    await hers.assert_push("USER_JOIN")
    await end(bob.at(alice.base))
    assert await his.closed() == 4401
    await hers.assert_push("USER_LEAVE", userId=bob.id)


async def test_other_sessions_of_the_same_user_stay(alice: Actor) -> None:
    other = await alice.at(alice.base).log_in()
    socket = await alice.connect()
    await other.post("/auth/logout")
    await socket.refute_push()
    await socket.push("ping")


async def test_what_redis_did_not_tell_is_found_in_postgresql(
    make_server: MakeServer, make_actor: MakeActor, database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("server.realtime.standing.RECHECK_SECONDS", 0.5)
    monkeypatch.setattr("server.realtime.standing.LOOKED_UP_AT_ONCE", 1)
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
        await until_refused(lambda: hers.push("file:change", workspaceId=workspace, change=1), "forbidden")
        connection.execute("UPDATE sessions SET ended_at = now() WHERE user_id = %s", [bob.id])
        assert await his.closed() == 4401


async def test_an_error_that_nobody_foresaw_does_not_end_the_looking(
    make_server: MakeServer, make_actor: MakeActor, database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("server.realtime.standing.RECHECK_SECONDS", 0.2)
    looks, vouch = 0, Standing.vouch

    async def counted(self: Standing) -> None:
        nonlocal looks
        await vouch(self)
        looks += 1

    monkeypatch.setattr(Standing, "vouch", counted)
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
    monkeypatch.setattr("server.realtime.standing.RECHECK_SECONDS", 600.0)
    last = looks + 1
    while looks < last:  # else a look of its own may find out first, and knows nobody's name
        await asyncio.sleep(0.05)
    assert (await alice.delete(path)).status == 204
    await his.assert_push("ACCESS_REVOKED", reason="removed", userName="Alice")


async def test_two_removals_at_once_each_have_their_reason(pair: Pair) -> None:
    alice, bob = pair
    projects = [await alice.make_project(bob) for _ in range(2)]
    workspaces = [await alice.make_workspace(project) for project in projects]
    his = await bob.connect(workspaces[0])
    await his.push("join:workspace", workspaceId=workspaces[1])
    paths = [await collaborator(alice, bob, project) for project in projects]
    await asyncio.gather(alice.delete(paths[0]), bob.delete(paths[1]))
    told = [await his.assert_push("ACCESS_REVOKED") for _ in range(2)]
    assert {each["workspaceId"]: each["reason"] for each in told} == {workspaces[0]: "removed", workspaces[1]: "left"}


async def test_a_loss_whose_notice_is_on_its_way_is_not_told_without_its_reason(
    server: str, make_actor: MakeActor, database_url: str
) -> None:
    """It is in PostgreSQL already when another loss of the same user is looked up."""
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


async def test_real_processes_tell_each_other(processes: Processes, make_actor: MakeActor) -> None:
    here, there = [server.base for server in (processes.server(), processes.server())]
    alice, bob = await make_actor("Alice", here), await make_actor("Bob", there)
    project = await alice.make_project(bob)
    workspace = await alice.make_workspace(project)
    his = await bob.connect(workspace)
    await alice.patch(await collaborator(alice, bob, project), {"role": "VIEWER"})
    await his.assert_push("ROLE_CHANGED")
    await until_refused(lambda: his.push("file:change", workspaceId=workspace, change=2), "forbidden")
    await bob.at(here).post("/auth/logout")
    assert await his.closed() == 4401
