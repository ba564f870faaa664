"""Projects: created, listed, changed and deleted."""

import asyncio

import asyncpg

from tests.actors import Actor
from tests.auth.test_accounts import wait_until_blocked
from tests.conftest import MakeActor, MakeServer


async def test_project_shows_its_owner_its_counts_and_the_role_of_the_caller(alice: Actor, bob: Actor) -> None:
    created = await alice.post("/projects", {"name": "  Engine  ", "description": "d", "settings": {"tabs": 4}})
    assert created.status == 201
    assert created.headers["Location"] == f"/api/v1/projects/{created['id']}"
    person = {"id": alice.id, "email": alice.email, "name": "Alice", "avatarUrl": None}
    expected = {"name": "Engine", "description": "d", "settings": {"tabs": 4}, "owner": person, "role": "OWNER"}
    assert expected.items() <= created.body.items()
    assert created["counts"] == {"workspaces": 0, "collaborators": 1}
    await alice.add(bob, created["id"], role="VIEWER")
    workspace = await alice.make_workspace(created["id"])
    seen = await bob.get(f"/projects/{created['id']}")
    assert (seen["role"], seen["counts"]) == ("VIEWER", {"workspaces": 1, "collaborators": 2})
    assert [item["id"] for item in seen["workspaces"]] == [workspace]
    assert [(member["user"]["id"], member["role"]) for member in seen["collaborators"]] == [
        (alice.id, "OWNER"),
        (bob.id, "VIEWER"),
    ]


async def test_counts_are_right_after_concurrent_changes(
    alice: Actor, bob: Actor, carol: Actor, make_actor: MakeActor
) -> None:
    project = await alice.make_project()
    dave = await make_actor("Dave", alice.base)
    workspaces = await asyncio.gather(*(alice.make_workspace(project) for _ in range(12)))
    members = await asyncio.gather(*(alice.add(user, project) for user in (bob, carol, dave)))
    await asyncio.gather(
        *(bob.delete(f"/workspaces/{workspace}") for workspace in workspaces[:5]),
        *(alice.make_workspace(project) for _ in range(3)),
        alice.delete(f"/projects/{project}/collaborators/{members[1]}"),
        dave.delete("/auth/profile", {"password": dave.password}),
        alice.patch(f"/projects/{project}", {"name": "other"}),
    )
    counts = {"workspaces": 10, "collaborators": 2}
    seen = await bob.get(f"/projects/{project}")
    assert (seen["counts"], len(seen["workspaces"]), len(seen["collaborators"])) == (counts, 10, 2)
    assert (await bob.get("/projects"))["items"][0]["counts"] == counts


async def test_the_single_project_shows_the_first_hundred_of_each(alice: Actor) -> None:
    project = await alice.make_project()
    for _ in range(101):
        await alice.make_workspace(project)
    seen = await alice.get(f"/projects/{project}")
    assert len(seen["workspaces"]) == 100
    assert seen["counts"]["workspaces"] == 101


async def test_change_sets_only_the_given_fields(alice: Actor) -> None:
    project = (await alice.post("/projects", {"name": "Engine", "description": "old", "settings": {"a": 1}})).body
    changed = await alice.patch(f"/projects/{project['id']}", {"name": "Engines"})
    assert changed.status == 200
    expected = project | {"name": "Engines", "updatedAt": changed["updatedAt"]}
    assert changed.body == expected
    assert changed["updatedAt"] > project["updatedAt"]
    assert (await alice.patch(f"/projects/{project['id']}")).status == 200  # no body means {}


async def test_deleting_a_project_deletes_its_contents(alice: Actor, bob: Actor) -> None:
    project = await alice.make_project(bob)
    workspace = await alice.make_workspace(project)
    assert (await alice.delete(f"/projects/{project}")).status == 204
    for path in (f"/projects/{project}", f"/workspaces/{workspace}", f"/projects/{project}/activity"):
        for actor in (alice, bob):
            assert (await actor.get(path)).status == 404
    assert (await bob.get("/projects"))["items"] == []


async def test_projects_are_listed_page_by_page_each_once(alice: Actor, bob: Actor) -> None:
    names = [f"project {number:02}" for number in range(7)]
    for name in names:
        await alice.make_project(name=name)
    await bob.make_project(name="not mine")
    seen, cursor = [], {}
    for _ in range(4):
        page = await alice.get("/projects", params={"limit": "2", "sort": "name"} | cursor)
        seen += [project["name"] for project in page["items"]]
        cursor = {"cursor": page["nextCursor"]}
    assert page["nextCursor"] is None
    assert seen == names
    newest_first = await alice.get("/projects", params={"sort": "-createdAt"})
    assert [project["name"] for project in newest_first["items"]] == names[::-1]


async def test_cursor_keeps_its_position_while_projects_are_deleted(alice: Actor) -> None:
    ids = [await alice.make_project(name=f"p{number}") for number in range(6)]
    first = await alice.get("/projects", params={"limit": "3", "sort": "createdAt"})
    await alice.delete(f"/projects/{ids[0]}")
    await alice.delete(f"/projects/{ids[2]}")  # the project that the cursor points at
    rest = await alice.get("/projects", params={"limit": "3", "sort": "createdAt", "cursor": first["nextCursor"]})
    assert [project["id"] for project in rest["items"]] == ids[3:]


async def test_cursor_of_another_list_is_rejected(alice: Actor) -> None:
    for name in ("a", "b"):
        await alice.make_project(name=name)
    cursor = (await alice.get("/projects", params={"limit": "1", "sort": "name"}))["nextCursor"]
    newest = (await alice.get("/projects", params={"limit": "1", "sort": "-createdAt"}))["nextCursor"]
    assert (await alice.get("/projects", params={"sort": "-createdAt", "cursor": newest})).status == 200
    project = (await alice.get("/projects"))["items"][0]["id"]
    for path, bad in (
        (f"/projects/{project}/collaborators", cursor),
        (f"/projects/{project}/activity", "WyJhY3Rpdml0eSIsICI5OTk5OTk5OTk5OTk5OTk5OTk5OSJd"),  # beyond a bigint
        ("/projects", "nonsense"),
        ("/projects?sort=createdAt", newest),
        ("/projects?sort=name", newest),
        ("/projects", cursor[:-2] + "!!"),
    ):
        response = await alice.get(path, params={"cursor": bad})
        assert (response.status, response.code) == (422, "validation_failed"), path
        assert response["details"][0]["field"] == "cursor"


async def test_projects_can_be_searched_by_role_and_words(alice: Actor, bob: Actor) -> None:
    await alice.make_project(bob, name="Difference Engine")
    await bob.make_project(name="Loom")

    async def search(**params: str) -> list[str]:
        return sorted(project["name"] for project in (await bob.get("/projects", params=params))["items"])

    assert await search() == ["Difference Engine", "Loom"]
    assert await search(role="owned") == ["Loom"]
    assert await search(role="collaborating") == ["Difference Engine"]
    assert await search(q="ENGINE") == ["Difference Engine"]
    assert await search(q="%") == []  # words, not patterns


async def test_an_etag_names_revision_and_role(alice: Actor, bob: Actor) -> None:
    project = await alice.make_project(bob)
    path = f"/projects/{project}"
    seen = await alice.get(path)
    tag = seen.headers["ETag"]
    assert (await alice.get(path, headers={"If-None-Match": tag})).status == 304
    assert (await alice.get(path, headers={"If-None-Match": f'W/{tag}, "other"'})).status == 304
    assert (await bob.get(path, headers={"If-None-Match": tag})).status == 200  # another role, another body
    refused = await alice.patch(path, {"name": "x"}, headers={"If-Match": '"1-owner"'})
    assert (refused.status, refused.code) == (412, "precondition_failed")
    for unreadable in (tag.strip('"'), "garbage", '"*"', "", f"x, {tag}"):
        refused = await alice.patch(path, {"name": "x"}, headers={"If-Match": unreadable})
        assert (refused.status, refused.code) == (412, "precondition_failed"), unreadable
    assert (await alice.call("HEAD", path, headers={"If-None-Match": tag})).status == 304
    changed = await alice.patch(path, {"name": "x"}, headers={"If-Match": tag})
    assert changed.status == 200
    assert changed.headers["ETag"] != tag
    assert (await alice.get(path)).headers["ETag"] == changed.headers["ETag"]
    assert (await alice.delete(path, headers={"If-Match": tag})).status == 412
    assert (await alice.delete(path, headers={"If-Match": "*"})).status == 204


async def test_every_visible_change_raises_the_revision(alice: Actor, bob: Actor, carol: Actor) -> None:
    project = await alice.make_project(bob)
    path, tags = f"/projects/{project}", set()

    async def note() -> None:
        tags.add((await alice.get(path)).headers["ETag"])

    await note()
    workspace = await alice.make_workspace(project)
    await note()
    await alice.patch(f"/workspaces/{workspace}", {"name": "other"})
    await note()
    await alice.delete(f"/workspaces/{workspace}")
    await note()
    member = await alice.add(carol, project, role="VIEWER")
    await note()
    await alice.patch(f"{path}/collaborators/{member}", {"role": "COLLABORATOR"})
    await note()
    await carol.patch("/auth/profile", {"name": "Caroline"})
    await note()
    await carol.patch("/auth/profile", {"avatarUrl": "https://example.org/c.png"})
    await note()
    await alice.delete(f"{path}/collaborators/{member}")
    await note()
    await bob.delete("/auth/profile", {"password": bob.password})
    await note()
    assert len(tags) == 10


async def test_one_of_fifty_changes_on_one_etag_succeeds(alice: Actor, make_server: MakeServer) -> None:
    project = await alice.make_project()
    both = [alice, alice.at(await make_server())]
    tag = (await alice.get(f"/projects/{project}")).headers["ETag"]
    responses = await asyncio.gather(
        *(
            both[number % 2].patch(f"/projects/{project}", {"name": f"n{number}"}, headers={"If-Match": tag})
            for number in range(50)
        )
    )
    assert sorted(response.status for response in responses) == [200] + [412] * 49
    winner = next(response for response in responses if response.status == 200)
    assert (await alice.get(f"/projects/{project}"))["name"] == winner["name"]


async def test_requests_that_race_with_the_deletion_of_their_project_get_404(
    alice: Actor, bob: Actor, database_url: str
) -> None:
    project = await alice.make_project()
    workspace = await alice.make_workspace(project)
    db = await asyncpg.connect(database_url)
    try:
        async with db.transaction():
            await db.execute("DELETE FROM projects WHERE id = $1", project)
            calls = [
                asyncio.ensure_future(alice.post(path, body))
                for path, body in (
                    ("/workspaces", {"projectId": project, "name": "Numbers"}),
                    (f"/workspaces/{workspace}/documents", {"path": "main.py"}),
                    (f"/projects/{project}/collaborators", {"email": bob.email}),
                    (f"/projects/{project}/collaborators", {"email": f"new-{bob.email}"}),
                )
            ]
            await wait_until_blocked(database_url, statements=len(calls))
    finally:
        await db.close()
    for response in await asyncio.gather(*calls):
        assert (response.status, response.code) == (404, "not_found"), response
