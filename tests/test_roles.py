"""The role matrix, derived from the router: every route × every kind of user × every id.

A new route is tested automatically; only the ids in its body (``BODIES``) and the ids of new kinds of resources
(``World.ids``) must be added here.
"""

import ast
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
from aiohttp import web

import server
from server.app import API, swagger_document
from server.projects.access import Role, requirement_of
from server.rest import examples
from server.rest.marks import is_public
from tests.actors import Actor, Response
from tests.conftest import MakeActor

# An authorized request fails after authorization: no revision has this tag, and no valid body is a list.
HARMLESS = {"If-Match": '"0-nobody"'}
SELF_OR_OWNER = {
    "remove_collaborator"
}  # @requires gives the least role; tests/projects/test_collaborators.py tests the rest


def workspace_body(world: "World", ids: dict[str, str]) -> dict[str, Any]:
    return {"projectId": ids["projectId"], "name": "x"}


def job_body(world: "World", ids: dict[str, str]) -> dict[str, Any]:
    payload = {"language": "python", "code": "print()"}
    return {"type": "CODE_EXECUTION", "payload": payload, "workspaceId": ids["workspaceId"]}


def project_query(world: "World", ids: dict[str, str]) -> dict[str, Any]:
    return {"projectId": ids["projectId"]}


BODIES = {"create_workspace": workspace_body, "create_job": job_body, "list_jobs": project_query}


@dataclass
class World:
    """A project with all kinds of users, and a project of a stranger."""

    people: dict[str, Actor]
    ids: dict[str, str]
    foreign: dict[str, str]

    def path(self, route: web.RouteDef, **other: str) -> str:
        return fill_path(route.path, {**self.ids, **other})


def fill_path(path: str, ids: dict[str, str]) -> str:
    return path.format_map(ids)


def routes() -> Iterator[web.RouteDef]:
    for route in (route for table in API for route in table):
        assert isinstance(route, web.RouteDef)
        if route.path.startswith("/api/") and not is_public(route.handler):
            yield route


def path_parameters(route: web.RouteDef) -> list[str]:
    return [part.strip("{}") for part in route.path.split("/") if part.endswith("Id}")]


def route_id(route: web.RouteDef) -> str:
    return f"{route.method} {route.path.removeprefix('/api/v1')}"


ROUTES = list(routes())
IN_PATH = [route for route in ROUTES if (needed := requirement_of(route.handler)) and not needed.kinds]
NAMED = [route for route in ROUTES if (needed := requirement_of(route.handler)) and needed.kinds]


@pytest.fixture
async def world(server: str, make_actor: MakeActor) -> World:
    people = {
        name: await make_actor(name, server) for name in ("Owner", "Collaborator", "Viewer", "Removed", "Stranger")
    }
    owner, stranger = people["Owner"], people["Stranger"]
    ids, foreign = await resource_ids_of(owner), await resource_ids_of(stranger)
    for name, role in (("Collaborator", "COLLABORATOR"), ("Viewer", "VIEWER"), ("Removed", "COLLABORATOR")):
        member = await owner.add(people[name], ids["projectId"], role=role)
    await owner.delete(f"/projects/{ids['projectId']}/collaborators/{member}")
    people["Revoked"] = revoked = owner.at(server)
    revoked.password = owner.password
    await revoked.log_in()
    assert (await revoked.post("/auth/logout")).status == 204
    people["Anonymous"] = Actor(owner.http, server, "Anonymous")
    return World(people, ids, foreign)


async def resource_ids_of(owner: Actor) -> dict[str, str]:
    """Create one resource of each kind; return their ids by the name of the path parameter."""
    project = await owner.make_project()
    member = (await owner.get(f"/projects/{project}/collaborators"))["items"][0]["id"]
    invited = await owner.post(f"/projects/{project}/collaborators", {"email": f"{uuid4().hex}@example.org"})
    workspace = await owner.make_workspace(project)
    document = await owner.post(f"/workspaces/{workspace}/documents", {"path": "main.py"})
    return {
        "projectId": project,
        "workspaceId": workspace,
        "documentId": document["id"],
        "version": "1",
        "collaboratorId": member,
        "invitationId": invited["invitation"]["id"],
        "sessionId": (await owner.get("/auth/sessions"))["items"][0]["id"],
        "name": "result.csv",
        "jobId": (await owner.post("/jobs", job_of()))["job"]["id"],
    }


def job_of() -> dict[str, Any]:
    return {"type": "CODE_EXECUTION", "payload": {"language": "python", "code": "print()"}}


def valid_body(route: web.RouteDef, ids: dict[str, str]) -> dict[str, Any]:
    """Return the required fields of the body, from the OpenAPI document, with these ids."""
    operation = DOCUMENT["paths"][route.path][route.method.lower()]
    reference = next((parameter["schema"] for parameter in operation["parameters"] if parameter["in"] == "body"), {})
    schema = DOCUMENT["definitions"].get(reference.get("$ref", "").rpartition("/")[2], {})
    body = {
        name: ids.get(name) or examples.example_for(schema["properties"][name], {}, name)
        for name in schema.get("required", ())
    }
    return {**body, **VALID.get(route.handler.__name__, {})}


DOCUMENT = swagger_document()
VALID: dict[str, dict[str, Any]] = {
    "create_job": {**job_of(), "runAt": "2100-01-01T00:00:00Z"},  # so that no worker of another test runs it
    "restore_version": {"version": 1},
}


async def ask(actor: Actor, route: web.RouteDef, path: str, body: Any = None) -> Response:
    """Send a request that has no effect, even if it is authorized."""
    if route.method == "GET":
        return await actor.get(path, params=body, headers=HARMLESS)
    if body is None and route.method in ("POST", "PUT", "PATCH"):
        body = []
    return await actor.call(route.method, path, body, headers=HARMLESS)


def expected(name: str, needed: Role) -> int | None:
    """Return the status of the rejection, or None if the request is authorized."""
    if name in ("Anonymous", "Revoked"):
        return 401
    if name in ("Stranger", "Removed"):
        return 404
    return None if Role[name.upper()] >= needed else 403


@pytest.mark.parametrize("route", ROUTES, ids=route_id)
async def test_route_requires_an_active_session_existing_ids_and_the_role(route: web.RouteDef, world: World) -> None:
    """Run all checks in one world, because making one takes longer than the requests.

    Authorized requests come last, because they may change the world.
    """
    await check_session_is_required(route, world)
    if path_parameters(route):
        await check_foreign_unknown_or_malformed_id_is_not_found(route, world)
    if route in IN_PATH:
        await check_role_is_required(route, world)


async def check_session_is_required(route: web.RouteDef, world: World) -> None:
    for name in ("Anonymous", "Revoked"):
        response = await ask(world.people[name], route, world.path(route))
        assert (response.status, response.code) == (401, "unauthenticated"), name


async def check_role_is_required(route: web.RouteDef, world: World) -> None:
    needed = requirement_of(route.handler)
    assert needed is not None
    for name, actor in world.people.items():
        response = await ask(actor, route, world.path(route))
        status = expected(name, needed.role)
        if status is None:
            assert response.status not in (401, 403, 404) or route.handler.__name__ in SELF_OR_OWNER, (name, response)
        else:
            assert response.status == status, (name, response)


@pytest.mark.parametrize("route", NAMED, ids=route_id)
async def test_route_with_ids_in_body_or_query_requires_the_role(route: web.RouteDef, world: World) -> None:
    needed, body = requirement_of(route.handler), BODIES[route.handler.__name__]
    assert needed is not None
    for name, actor in world.people.items():
        response = await ask(actor, route, world.path(route), body(world, world.ids))
        status = expected(name, needed.role)
        assert response.status == status if status else response.status in (200, 201), (name, response)
    for ids in (world.foreign, dict.fromkeys(world.ids, str(uuid4()))):
        assert (await ask(world.people["Owner"], route, world.path(route), body(world, ids))).status == 404


async def check_foreign_unknown_or_malformed_id_is_not_found(route: web.RouteDef, world: World) -> None:
    """Check that a bad id is not found, even if the rest of the request is valid."""
    owner = world.people["Owner"]
    body = valid_body(route, world.ids) or None
    for slot in path_parameters(route):
        for other in (world.foreign[slot], str(uuid4()), "1%20OR%201=1", "%00", "a" * 2000, "..%2f..", "null"):
            response = await owner.call(route.method, world.path(route, **{slot: other}), body)
            assert response.status == 404, (slot, other, response)


async def test_rejected_requests_change_nothing(world: World) -> None:
    owner = world.people["Owner"]
    before = (await owner.get(f"/projects/{world.ids['projectId']}")).headers["ETag"]
    for route in IN_PATH:
        for name in ("Stranger", "Removed", "Anonymous", "Revoked"):
            await ask(world.people[name], route, world.path(route))
    assert (await owner.get(f"/projects/{world.ids['projectId']}")).headers["ETag"] == before


SERVER = Path(server.__file__).parent
ACCESS = "projects/access.py"
KNOW_MEMBERS = {
    ACCESS,
    "projects/store.py",  # lists the projects of a user
    "projects/members_store.py",  # changes the members of a project
    "projects/invitations_store.py",  # accepting an invitation adds a member
    "auth/store.py",  # an account that owns projects with other members cannot be deleted
    "documents/store.py",  # one statement checks the role and makes the edit
}


def sources() -> Iterator[tuple[str, ast.AST]]:
    for path in SERVER.rglob("*.py"):
        yield str(path.relative_to(SERVER)), ast.parse(path.read_text())


def test_membership_is_queried_in_few_places() -> None:
    query = re.compile(r"\b(FROM|JOIN|UPDATE|INTO)\s+members\b")
    modules = {
        name
        for name, tree in sources()
        for node in ast.walk(tree)
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and query.search(node.value)
    }
    assert modules == KNOW_MEMBERS


def test_roles_are_compared_in_one_place() -> None:
    modules = {
        name
        for name, tree in sources()
        for node in ast.walk(tree)
        if isinstance(node, ast.Compare) and any(is_a_role(operand) for operand in (node.left, *node.comparators))
    }
    assert modules == {ACCESS, "rest/etags.py"}  # it checks whether a tag is of another role


def is_a_role(node: ast.expr) -> bool:
    """Recognize ``role``, ``access.role``, ``Role.OWNER``, ``row["role"]`` and ``"OWNER"``."""
    words = re.findall(r"\w+", ast.unparse(node))
    return bool({"role", "Role"} & set(words[:1] + words[-1:])) or bool({role.name for role in Role} & set(words))
