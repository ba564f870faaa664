"""Workspaces over REST."""

from uuid import uuid4

from tests.actors import Actor


async def test_workspace_is_created_read_changed_and_deleted(alice: Actor) -> None:
    project = await alice.make_project()
    body = {"projectId": project, "name": " Numbers ", "description": "d", "meta": {"order": [2, 1]}}
    created = await alice.post("/workspaces", body)
    assert created.status == 201
    path = f"/workspaces/{created['id']}"
    assert created.headers["Location"] == f"/api/v1{path}"
    assert (body | {"name": "Numbers"}).items() <= created.body.items()
    assert (await alice.get(path)).body == created.body
    changed = await alice.patch(path, {"meta": {"order": []}})
    assert changed.body == created.body | {"meta": {"order": []}, "updatedAt": changed["updatedAt"]}
    assert (await alice.delete(path)).status == 204
    for response in (await alice.get(path), await alice.patch(path, {}), await alice.delete(path)):
        assert (response.status, response.code) == (404, "not_found")


async def test_workspaces_are_listed_oldest_first_page_by_page(alice: Actor) -> None:
    project = await alice.make_project()
    ids = [await alice.make_workspace(project) for _ in range(5)]
    first = await alice.get(f"/workspaces/project/{project}", params={"limit": "3"})
    rest = await alice.get(f"/workspaces/project/{project}", params={"limit": "3", "cursor": first["nextCursor"]})
    assert [workspace["id"] for workspace in first["items"] + rest["items"]] == ids
    assert rest["nextCursor"] is None


async def test_viewer_can_read_but_not_change_workspaces(alice: Actor, bob: Actor) -> None:
    project = await alice.make_project(bob, role="VIEWER")
    path = f"/workspaces/{await alice.make_workspace(project)}"
    assert (await bob.get(path)).status == 200
    assert (await bob.get(f"/workspaces/project/{project}")).status == 200
    for response in (
        await bob.patch(path, {"name": "x"}),
        await bob.delete(path),
        await bob.post("/workspaces", {"projectId": project, "name": "x"}),
    ):
        assert (response.status, response.code) == (403, "forbidden")


async def test_workspace_requires_a_project_of_the_caller(alice: Actor, bob: Actor) -> None:
    project = await alice.make_project()
    for foreign in (project, str(uuid4())):
        refused = await bob.post("/workspaces", {"projectId": foreign, "name": "x"})
        assert (refused.status, refused.code) == (404, "not_found")
    malformed = await bob.post("/workspaces", {"projectId": "1 OR 1=1", "name": "x"})
    assert (malformed.status, malformed["details"][0]["field"]) == (422, "projectId")


async def test_a_workspace_honours_its_etag(alice: Actor) -> None:
    workspace = await alice.make_workspace()
    path = f"/workspaces/{workspace}"
    tag = (await alice.get(path)).headers["ETag"]
    assert (await alice.get(path, headers={"If-None-Match": tag})).status == 304
    assert (await alice.patch(path, {"name": "one"}, headers={"If-Match": tag})).status == 200
    assert (await alice.get(path, headers={"If-None-Match": tag})).status == 200
    for response in (
        await alice.patch(path, {"name": "two"}, headers={"If-Match": tag}),
        await alice.delete(path, headers={"If-Match": tag}),
    ):
        assert (response.status, response.code) == (412, "precondition_failed")
    assert (await alice.get(path))["name"] == "one"
