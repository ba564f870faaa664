"""Members of a project: added, changed and removed; a project is transferred, and never without an owner."""

import asyncio
from uuid import uuid4

import asyncpg

from tests.actors import Actor
from tests.conftest import MakeActor


async def test_a_known_user_is_added_at_once_and_only_once(alice: Actor, bob: Actor) -> None:
    project = await alice.make_project()
    path = f"/projects/{project}/collaborators"
    added = await alice.post(path, {"email": bob.email.upper(), "role": "VIEWER"})
    assert added.status == 201
    assert added["collaborator"]["user"] == {"id": bob.id, "email": bob.email, "name": "Bob", "avatarUrl": None}
    assert added.headers["Location"] == f"/api/v1{path}/{added['collaborator']['id']}"
    for email in (bob.email, alice.email):
        again = await alice.post(path, {"email": email})
        assert (again.status, again.code) == (409, "already_collaborator")


async def test_twenty_concurrent_additions_create_one_member(alice: Actor, bob: Actor) -> None:
    project = await alice.make_project()
    responses = await asyncio.gather(
        *(alice.post(f"/projects/{project}/collaborators", {"email": bob.email}) for _ in range(20))
    )
    assert sorted(response.status for response in responses) == [201] + [409] * 19


async def test_members_are_listed_page_by_page_the_owner_first(
    alice: Actor, make_actor: MakeActor, server: str
) -> None:
    project = await alice.make_project()
    others = [await make_actor(f"Member{number}", server) for number in range(4)]
    for other in others:
        await alice.add(other, project)
    first = await alice.get(f"/projects/{project}/collaborators", params={"limit": "3"})
    rest = await alice.get(f"/projects/{project}/collaborators", params={"cursor": first["nextCursor"]})
    listed = first["items"] + rest["items"]
    assert [member["user"]["id"] for member in listed] == [alice.id, *(other.id for other in others)]
    assert [member["role"] for member in listed] == ["OWNER"] + ["COLLABORATOR"] * 4
    assert rest["nextCursor"] is None


async def test_a_role_takes_effect_with_the_next_request(alice: Actor, bob: Actor) -> None:
    project = await alice.make_project()
    member = await alice.add(bob, project, role="VIEWER")
    refused = await bob.patch(f"/projects/{project}", {"name": "mine"})
    assert (refused.status, refused.code) == (403, "forbidden")
    changed = await alice.patch(f"/projects/{project}/collaborators/{member}", {"role": "COLLABORATOR"})
    assert (changed.status, changed["role"], changed["id"]) == (200, "COLLABORATOR", member)
    assert (await bob.patch(f"/projects/{project}", {"name": "ours"})).status == 200


async def test_a_removed_collaborator_sees_nothing_more(alice: Actor, bob: Actor) -> None:
    project = await alice.make_project()
    member = await alice.add(bob, project)
    workspace = await bob.make_workspace(project)
    assert (await alice.delete(f"/projects/{project}/collaborators/{member}")).status == 204
    assert (await bob.get(f"/projects/{project}")).status == 404
    assert (await bob.get(f"/workspaces/{workspace}")).status == 404
    assert (await alice.delete(f"/projects/{project}/collaborators/{member}")).status == 404


async def test_members_may_leave_and_only_the_owner_may_remove_others(alice: Actor, bob: Actor, carol: Actor) -> None:
    project = await alice.make_project()
    bobs, carols = await alice.add(bob, project), await alice.add(carol, project, role="VIEWER")
    path = f"/projects/{project}/collaborators"
    for other in (carols, str(uuid4())):
        assert (await bob.delete(f"{path}/{other}")).status == 403
    assert (await carol.delete(f"{path}/{carols}")).status == 204
    assert (await carol.get(f"/projects/{project}")).status == 404
    assert (await bob.delete(f"{path}/{bobs}")).status == 204


async def test_the_owner_can_be_neither_changed_nor_removed(alice: Actor) -> None:
    project = await alice.make_project()
    owner = (await alice.get(f"/projects/{project}/collaborators"))["items"][0]["id"]
    path = f"/projects/{project}/collaborators/{owner}"
    for response in (await alice.patch(path, {"role": "VIEWER"}), await alice.delete(path)):
        assert (response.status, response.code) == (409, "owner_immutable")


async def test_a_collaborator_of_one_project_is_none_of_another(alice: Actor, bob: Actor) -> None:
    one, other = await alice.make_project(), await alice.make_project()
    member = await alice.add(bob, one)
    path = f"/projects/{other}/collaborators/{member}"
    assert (await alice.patch(path, {"role": "VIEWER"})).status == 404
    assert (await alice.delete(path)).status == 404
    assert (await bob.get(f"/projects/{one}"))["role"] == "COLLABORATOR"


async def test_owner_role_cannot_be_assigned(alice: Actor, bob: Actor) -> None:
    project = await alice.make_project()
    member = await alice.add(bob, project)
    for response in (
        await alice.patch(f"/projects/{project}/collaborators/{member}", {"role": "OWNER"}),
        await alice.post(f"/projects/{project}/collaborators", {"email": "x@example.org", "role": "OWNER"}),
    ):
        assert (response.status, response["details"][0]["field"]) == (422, "role")


async def test_resource_without_an_etag_rejects_if_match(alice: Actor, bob: Actor) -> None:
    project = await alice.make_project()
    member = await alice.add(bob, project)
    path = f"/projects/{project}/collaborators/{member}"
    assert (await alice.delete(path, headers={"If-Match": '"1"'})).status == 412
    assert (await alice.delete(path, headers={"If-Match": "*"})).status == 204


async def test_a_transfer_makes_the_old_owner_a_collaborator(alice: Actor, bob: Actor, carol: Actor) -> None:
    project = await alice.make_project(bob, role="VIEWER")
    moved = await alice.post(f"/projects/{project}/transfer", {"userId": bob.id})
    assert (moved.status, moved["role"], moved["owner"]["id"]) == (200, "COLLABORATOR", bob.id)
    assert (await bob.get(f"/projects/{project}"))["role"] == "OWNER"
    assert (await alice.post(f"/projects/{project}/transfer", {"userId": alice.id})).status == 403
    for user_id in (carol.id, bob.id, str(uuid4())):
        refused = await bob.post(f"/projects/{project}/transfer", {"userId": user_id})
        assert (refused.status, refused["details"][0]["field"]) == (422, "userId")
    assert (await bob.get(f"/projects/{project}"))["role"] == "OWNER"


async def test_concurrent_transfers_leave_one_owner(alice: Actor, bob: Actor, carol: Actor) -> None:
    project = await alice.make_project(bob, carol)
    responses = await asyncio.gather(
        *(alice.post(f"/projects/{project}/transfer", {"userId": to.id}) for to in (bob, carol) * 10)
    )
    assert sorted(response.status for response in responses) == [200] + [403] * 19
    roles = [member["role"] for member in (await alice.get(f"/projects/{project}/collaborators"))["items"]]
    assert sorted(roles) == ["COLLABORATOR", "COLLABORATOR", "OWNER"]


async def test_activity_lists_actors_and_actions_newest_first(alice: Actor, bob: Actor) -> None:
    project = await alice.make_project()
    member = await alice.add(bob, project)
    workspace = await bob.make_workspace(project)
    await bob.patch(f"/workspaces/{workspace}", {"name": "Crunch"})
    await alice.patch(f"/projects/{project}/collaborators/{member}", {"role": "VIEWER"})
    first = await alice.get(f"/projects/{project}/activity", params={"limit": "2"})
    rest = await bob.get(f"/projects/{project}/activity", params={"cursor": first["nextCursor"]})
    actions = [(entry["actor"]["id"], entry["action"]) for entry in first["items"] + rest["items"]]
    assert actions == [
        (alice.id, "collaborator.role_changed"),
        (bob.id, "workspace.updated"),
        (bob.id, "workspace.created"),
        (alice.id, "collaborator.added"),
        (alice.id, "project.created"),
    ]
    assert first["items"][1]["subject"] == {"workspaceId": workspace, "name": "Crunch"}
    await bob.delete("/auth/profile", {"password": bob.password})
    after = await alice.get(f"/projects/{project}/activity")
    assert [entry["action"] for entry in after["items"] if entry["actor"] is None] == [
        "workspace.updated",
        "workspace.created",
    ]


async def test_activity_keeps_the_newest_ten_thousand_entries(alice: Actor, database_url: str) -> None:
    project, other = await alice.make_project(), await alice.make_project()
    db = await asyncpg.connect(database_url)
    try:
        for project_id, entries in ((project, 10_500), (other, 10)):
            await db.execute(
                """
                INSERT INTO activity (project_id, action, subject)
                SELECT $1, 'test', to_jsonb(n) FROM generate_series(1, $2::int) n
                """,
                project_id,
                entries,
            )
        query = "SELECT count(*), max(subject::text::int) FROM activity WHERE project_id = $1 AND action = 'test'"
        count, newest = await db.fetchrow(query, project)
        assert 10_000 <= count < 10_200
        assert newest == 10_500
        assert (await db.fetchrow(query, other))[0] == 10
    finally:
        await db.close()
