"""The role matrix, made from the router itself: every route × everybody × every id.

A route that is added is tested without being named here, but for what its body must name (``BODIES``) and the ids
of new kinds of things (``World.ids``).
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
from tests.actors import Actor, Answer
from tests.conftest import MakeActor

# Whoever is let in gets no further than this: no revision of anything has such a tag, no body is a list.
HARMLESS = {"If-Match": '"0-nobody"'}
SELF_OR_OWNER = {"remove_collaborator"}  # its @requires is the least; the rest is tests/projects/test_collaborators.py


def workspace_body(world: "World", where: dict[str, str]) -> dict[str, Any]:
    return {"projectId": where["projectId"], "name": "x"}


def job_body(world: "World", where: dict[str, str]) -> dict[str, Any]:
    payload = {"language": "python", "code": "print()"}
    return {"type": "CODE_EXECUTION", "payload": payload, "workspaceId": where["workspaceId"]}


def project_query(world: "World", where: dict[str, str]) -> dict[str, Any]:
    return {"projectId": where["projectId"]}


BODIES = {"create_workspace": workspace_body, "create_job": job_body, "list_jobs": project_query}


@dataclass
class World:
    """One project with everybody in it, and another one of a stranger."""

    people: dict[str, Actor]
    ids: dict[str, str]
    foreign: dict[str, str]

    def path(self, route: web.RouteDef, **other: str) -> str:
        return fill(route.path, {**self.ids, **other})


def fill(path: str, ids: dict[str, str]) -> str:
    return path.format_map(ids)


def routes() -> Iterator[web.RouteDef]:
    for route in (route for table in API for route in table):
        assert isinstance(route, web.RouteDef)
        if route.path.startswith("/api/") and not is_public(route.handler):
            yield route


def slots(route: web.RouteDef) -> list[str]:
    return [part.strip("{}") for part in route.path.split("/") if part.endswith("Id}")]


def route_id(route: web.RouteDef) -> str:
    return f"{route.method} {route.path.removeprefix('/api/v1')}"


ROUTES = list(routes())
IN_PATH = [route for route in ROUTES if (needed := requirement_of(route.handler)) and not needed.of]
NAMED = [route for route in ROUTES if (needed := requirement_of(route.handler)) and needed.of]


@pytest.fixture
async def world(server: str, make_actor: MakeActor) -> World:
    people = {
        name: await make_actor(name, server) for name in ("Owner", "Collaborator", "Viewer", "Removed", "Stranger")
    }
    owner, stranger = people["Owner"], people["Stranger"]
    ids, foreign = await things_of(owner), await things_of(stranger)
    for name, role in (("Collaborator", "COLLABORATOR"), ("Viewer", "VIEWER"), ("Removed", "COLLABORATOR")):
        member = await owner.add(people[name], ids["projectId"], role=role)
    await owner.delete(f"/projects/{ids['projectId']}/collaborators/{member}")
    people["Revoked"] = revoked = owner.at(server)
    revoked.password = owner.password
    await revoked.log_in()
    assert (await revoked.post("/auth/logout")).status == 204
    people["Anonymous"] = Actor(owner.http, server, "Anonymous")
    return World(people, ids, foreign)


async def things_of(owner: Actor) -> dict[str, str]:
    """One of each kind, by the name of its slot."""
    project = await owner.make_project()
    member = (await owner.get(f"/projects/{project}/collaborators"))["items"][0]["id"]
    invited = await owner.post(f"/projects/{project}/collaborators", {"email": f"{uuid4().hex}@example.org"})
    workspace = await owner.make_workspace(project)
    made = await owner.post(f"/workspaces/{workspace}/documents", {"path": "main.py"})
    return {
        "projectId": project,
        "workspaceId": workspace,
        "documentId": made["id"],
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
    """What must be in it, as the document shows it, with these ids."""
    operation = DOCUMENT["paths"][route.path][route.method.lower()]
    taken = next((each["schema"] for each in operation["parameters"] if each["in"] == "body"), {})
    schema = DOCUMENT["definitions"].get(taken.get("$ref", "").rpartition("/")[2], {})
    made = {
        name: ids.get(name) or examples.of(schema["properties"][name], {}, name) for name in schema.get("required", ())
    }
    return {**made, **VALID.get(route.handler.__name__, {})}


DOCUMENT = swagger_document()
VALID: dict[str, dict[str, Any]] = {
    "create_job": {**job_of(), "runAt": "2100-01-01T00:00:00Z"},  # no worker of another test is to run it
    "restore_version": {"version": 1},
}


async def ask(actor: Actor, route: web.RouteDef, path: str, body: Any = None) -> Answer:
    """So that nothing comes of it even where it is allowed."""
    if route.method == "GET":
        return await actor.get(path, params=body, headers=HARMLESS)
    if body is None and route.method in ("POST", "PUT", "PATCH"):
        body = []
    return await actor.call(route.method, path, body, headers=HARMLESS)


def expected(name: str, needed: Role) -> int | None:
    """The status of a refusal, None where they are let in."""
    if name in ("Anonymous", "Revoked"):
        return 401
    if name in ("Stranger", "Removed"):
        return 404
    return None if Role[name.upper()] >= needed else 403


@pytest.mark.parametrize("route", ROUTES, ids=route_id)
async def test_nobody_gets_in_but_whom_the_session_the_ids_and_the_role_allow(
    route: web.RouteDef, world: World
) -> None:
    """All of it in one world: to make one takes longer than to ask. What is allowed comes last, it may change it."""
    await nobody_without_a_living_session_gets_in(route, world)
    if slots(route):
        await an_id_that_is_foreign_unknown_or_malformed_is_not_found_in_any_slot(route, world)
    if route in IN_PATH:
        await each_gets_what_their_role_allows(route, world)


async def nobody_without_a_living_session_gets_in(route: web.RouteDef, world: World) -> None:
    for name in ("Anonymous", "Revoked"):
        answer = await ask(world.people[name], route, world.path(route))
        assert (answer.status, answer.code) == (401, "unauthenticated"), name


async def each_gets_what_their_role_allows(route: web.RouteDef, world: World) -> None:
    needed = requirement_of(route.handler)
    assert needed is not None
    for name, actor in world.people.items():
        answer = await ask(actor, route, world.path(route))
        refusal = expected(name, needed.role)
        if refusal is None:
            assert answer.status not in (401, 403, 404) or route.handler.__name__ in SELF_OR_OWNER, (name, answer)
        else:
            assert answer.status == refusal, (name, answer)


@pytest.mark.parametrize("route", NAMED, ids=route_id)
async def test_each_gets_what_their_role_allows_where_the_body_names_it(route: web.RouteDef, world: World) -> None:
    needed, body = requirement_of(route.handler), BODIES[route.handler.__name__]
    assert needed is not None
    for name, actor in world.people.items():
        answer = await ask(actor, route, world.path(route), body(world, world.ids))
        refusal = expected(name, needed.role)
        assert answer.status == refusal if refusal else answer.status in (200, 201), (name, answer)
    for ids in (world.foreign, dict.fromkeys(world.ids, str(uuid4()))):
        assert (await ask(world.people["Owner"], route, world.path(route), body(world, ids))).status == 404


async def an_id_that_is_foreign_unknown_or_malformed_is_not_found_in_any_slot(
    route: web.RouteDef, world: World
) -> None:
    """Whatever else is right with the request."""
    owner = world.people["Owner"]
    body = valid_body(route, world.ids) or None
    for slot in slots(route):
        for other in (world.foreign[slot], str(uuid4()), "1%20OR%201=1", "%00", "a" * 2000, "..%2f..", "null"):
            answer = await owner.call(route.method, world.path(route, **{slot: other}), body)
            assert answer.status == 404, (slot, other, answer)


async def test_what_is_refused_changes_nothing(world: World) -> None:
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
    "projects/store.py",  # whose projects there are
    "projects/members_store.py",  # changes who is in a project
    "projects/invitations_store.py",  # to accept one is to be in it
    "auth/store.py",  # an account that owns projects with others in them is not deleted
    "documents/store.py",  # an edit and the right to make it are one statement
}


def sources() -> Iterator[tuple[str, ast.AST]]:
    for path in SERVER.rglob("*.py"):
        yield str(path.relative_to(SERVER)), ast.parse(path.read_text())


def test_who_is_in_a_project_is_asked_in_few_places() -> None:
    asked = re.compile(r"\b(FROM|JOIN|UPDATE|INTO)\s+members\b")
    found = {
        name
        for name, tree in sources()
        for node in ast.walk(tree)
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and asked.search(node.value)
    }
    assert found == KNOW_MEMBERS


def test_roles_are_weighed_in_one_place() -> None:
    found = {
        name
        for name, tree in sources()
        for node in ast.walk(tree)
        if isinstance(node, ast.Compare) and any(is_a_role(each) for each in (node.left, *node.comparators))
    }
    assert found == {ACCESS, "rest/etags.py"}  # there: whether a tag is of another role


def is_a_role(node: ast.expr) -> bool:
    """``role``, ``access.role``, ``Role.OWNER``, ``row["role"]``, ``"OWNER"``."""
    words = re.findall(r"\w+", ast.unparse(node))
    return bool({"role", "Role"} & set(words[:1] + words[-1:])) or bool({each.name for each in Role} & set(words))
