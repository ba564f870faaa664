"""Access control: each role has its rights on every kind of resource, and strangers learn nothing."""

from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any
from uuid import UUID, uuid4

import pytest

from server import postgres
from server.errors import Forbidden, NotFound, ValidationFailed
from server.postgres import Database
from server.projects import access
from server.projects.access import Access, Requirement, ResourceKind, Role, resource_ids
from server.realtime.grants import ResourceRef
from tests.actors import Actor

LEAST = {"Owner": Role.OWNER, "Collaborator": Role.COLLABORATOR, "Viewer": Role.VIEWER}


@pytest.fixture
async def db(database_url: str) -> AsyncIterator[Database]:
    database = await postgres.connect(database_url)
    yield database
    await database.close()


@dataclass
class World:
    users: dict[str, UUID]
    things: dict[ResourceKind, UUID]
    revision: int


@pytest.fixture
async def world(alice: Actor, bob: Actor, carol: Actor) -> World:
    project = await alice.make_project(bob)
    await alice.add(carol, project, role="VIEWER")
    return World(
        {"Owner": UUID(alice.id), "Collaborator": UUID(bob.id), "Viewer": UUID(carol.id), "Stranger": uuid4()},
        await things_in(alice, project),
        int((await alice.get(f"/projects/{project}")).headers["ETag"].strip('"').partition("-")[0]),
    )


async def things_in(owner: Actor, project: str) -> dict[ResourceKind, UUID]:
    workspace = await owner.make_workspace(project)
    document = (await owner.post(f"/workspaces/{workspace}/documents", {"path": "main.py"}))["id"]
    return {
        ResourceKind.PROJECT: UUID(project),
        ResourceKind.WORKSPACE: UUID(workspace),
        ResourceKind.DOCUMENT: UUID(document),
    }


@pytest.mark.parametrize("needed", Role)
@pytest.mark.parametrize("has", Role)
def test_role_includes_the_lesser_roles(has: Role, needed: Role) -> None:
    granted = Access(project=uuid4(), role=has, revision=1)
    allowed = ["VIEWER", "COLLABORATOR", "OWNER"].index(has.name) >= ["VIEWER", "COLLABORATOR", "OWNER"].index(
        needed.name
    )
    assert granted.allows(needed) is allowed
    if allowed:
        granted.require(needed)
    else:
        with pytest.raises(Forbidden) as refused:
            granted.require(needed)
        assert needed.name in refused.value.detail
        assert has.name in refused.value.detail


@pytest.mark.parametrize("kind", ResourceKind)
async def test_members_have_their_role_in_every_kind_of_resource(
    db: Database, world: World, kind: ResourceKind
) -> None:
    for name, role in LEAST.items():
        granted = await access.check(db, user=world.users[name], kind=kind, id=world.things[kind], role=Role.VIEWER)
        assert granted == Access(world.things[ResourceKind.PROJECT], role, world.revision)
    with pytest.raises(Forbidden):
        await access.check(db, user=world.users["Viewer"], kind=kind, id=world.things[kind], role=Role.COLLABORATOR)


@pytest.mark.parametrize("kind", ResourceKind)
async def test_strangers_cannot_find_out_which_resources_exist(db: Database, world: World, kind: ResourceKind) -> None:
    details = []
    for user, id in ((world.users["Stranger"], world.things[kind]), (world.users["Owner"], uuid4())):
        with pytest.raises(NotFound) as refused:
            await access.check(db, user=user, kind=kind, id=id, role=Role.VIEWER)
        details.append(refused.value.detail)
    assert details == [f"{kind.value.capitalize()} not found"] * 2


async def test_id_belongs_to_one_kind_of_resource(db: Database, world: World) -> None:
    for kind in ResourceKind:
        for other in set(ResourceKind) - {kind}:
            with pytest.raises(NotFound):
                await access.check(db, user=world.users["Owner"], kind=other, id=world.things[kind], role=Role.VIEWER)


def test_kinds_of_resources_follow_from_field_names() -> None:
    assert resource_ids("documentId", "projectId") == (ResourceKind.DOCUMENT, ResourceKind.PROJECT)
    assert resource_ids() == ()


NEEDED = Requirement(Role.COLLABORATOR, resource_ids("documentId", "workspaceId", "projectId"))


def values(things: dict[ResourceKind, UUID], *kinds: ResourceKind) -> dict[str, Any]:
    return {f"{kind.value}_id": things[kind] for kind in kinds}


async def test_named_resources_require_the_role_and_missing_ones_do_not(db: Database, world: World) -> None:
    for kinds in ([ResourceKind.PROJECT], [ResourceKind.WORKSPACE], [ResourceKind.DOCUMENT], list(ResourceKind)):
        payload = values(world.things, *kinds)
        granted = await access.check_payload(db, NEEDED, user=world.users["Collaborator"], values=payload)
        assert granted == Access(world.things[ResourceKind.PROJECT], Role.COLLABORATOR, world.revision)
        with pytest.raises(Forbidden):
            await access.check_payload(db, NEEDED, user=world.users["Viewer"], values=payload)
        with pytest.raises(NotFound):
            await access.check_payload(db, NEEDED, user=world.users["Stranger"], values=payload)
    for empty in ({}, {"project_id": None, "workspace_id": None}):
        assert await access.check_payload(db, NEEDED, user=world.users["Stranger"], values=empty) is None


async def test_resources_of_different_projects_are_rejected(db: Database, world: World, alice: Actor) -> None:
    other = await things_in(alice, await alice.make_project())
    payload = values(world.things, ResourceKind.WORKSPACE) | values(other, ResourceKind.PROJECT)
    with pytest.raises(ValidationFailed) as refused:
        await access.check_payload(db, NEEDED, user=world.users["Owner"], values=payload)
    assert [detail["field"] for detail in refused.value.details] == ["projectId"]


async def test_recheck_returns_the_active_sessions_and_the_remaining_access(
    db: Database, world: World, alice: Actor
) -> None:
    sessions = [UUID(session["id"]) for session in (await alice.get("/auth/sessions"))["items"]]
    workspace, document = (
        ResourceRef(kind.value, world.things[kind]) for kind in (ResourceKind.WORKSPACE, ResourceKind.DOCUMENT)
    )
    grants = [
        (world.users["Stranger"], workspace),
        (world.users["Viewer"], document),
        (world.users["Owner"], workspace),
        (world.users["Owner"], ResourceRef("workspace", uuid4())),
    ]
    active, granted = await access.recheck(db, [*sessions, uuid4()], grants)
    assert active == set(sessions)
    assert {key: granted_access.role for key, granted_access in granted.items()} == {
        grants[1]: Role.VIEWER,
        grants[2]: Role.OWNER,
    }
    assert await access.recheck(db, [], []) == (set(), {})


async def test_freshness_check_rejects_a_replica_that_lags(db: Database, world: World) -> None:
    for revision, is_fresh in ((world.revision - 1, True), (world.revision, True), (world.revision + 1, False)):
        freshness_check = access.freshness_check(Access(world.things[ResourceKind.PROJECT], Role.OWNER, revision))
        assert await freshness_check(db) is is_fresh
    assert not await access.freshness_check(Access(uuid4(), Role.OWNER, 1))(db)
