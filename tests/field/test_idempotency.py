"""Faults of repeated requests that users saw: two projects, two documents, two invitations."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from datetime import timedelta
from typing import Any

import aiohttp
import asyncpg
import pytest
from aiohttp import web

from server import postgres
from server.app import API, swagger_document
from server.rest.idempotency import delete_expired_keys
from server.rest.marks import idempotency_of
from tests.actors import Actor, Response
from tests.auth.test_accounts import wait_until_blocked
from tests.conftest import RELAXED_TIMEOUT_SECONDS, MakeActor, MakeServer
from tests.jobs.requests import program_job
from tests.processes import Processes

KEY = "order-1815"


class CreateEndpoint:
    """An endpoint that creates resources: its path, a body, and a count of the resources."""

    def __init__(self, path: str, body: dict[str, Any], count: Callable[[Actor], Awaitable[int]]) -> None:
        self.path, self.body, self.count = path, body, count

    async def post(self, actor: Actor, key: str = KEY, **change: Any) -> Response:
        return await actor.post(self.path, self.body | change, headers={"Idempotency-Key": key})

    async def post_until_acknowledged(self, actor: Actor, key: str = KEY) -> Response:
        """Post until the response is neither 503 nor "in progress", as clients do."""
        while (answer := await self.post(actor, key)).body.get("code") in ("unavailable", "idempotency_in_progress"):
            await asyncio.sleep(0.1)
        return answer


def count_items(path: str) -> Callable[[Actor], Awaitable[int]]:
    async def count(actor: Actor) -> int:
        return len((await actor.get(path, params={"limit": "100"}))["items"])

    return count


KINDS = ("project", "workspace", "document", "collaborator", "invitation", "job")


async def endpoint_for(kind: str, alice: Actor, bob: Actor) -> CreateEndpoint:
    if kind == "project":
        return CreateEndpoint("/projects", {"name": "Engine"}, count_items("/projects"))
    if kind == "job":
        return CreateEndpoint("/jobs", {**program_job(), "runAt": "2100-01-01T00:00:00Z"}, count_items("/jobs"))
    project = await alice.make_project()
    if kind == "workspace":
        return CreateEndpoint(
            "/workspaces", {"projectId": project, "name": "W"}, count_items(f"/workspaces/project/{project}")
        )
    if kind == "document":
        path = f"/workspaces/{await alice.make_workspace(project)}/documents"
        return CreateEndpoint(path, {"path": "main.py", "content": "1"}, count_items(path))
    collaborators = f"/projects/{project}/collaborators"
    if kind == "collaborator":
        return CreateEndpoint(collaborators, {"email": bob.email}, count_items(collaborators))
    return CreateEndpoint(collaborators, {"email": f"new-{bob.email}"}, count_items(f"/projects/{project}/invitations"))


@pytest.mark.parametrize("kind", KINDS)
async def test_a_repeated_post_created_a_second_resource(alice: Actor, bob: Actor, kind: str) -> None:
    endpoint = await endpoint_for(kind, alice, bob)
    before = await endpoint.count(alice)
    first = await endpoint.post(alice)
    assert (first.status, "Idempotent-Replayed" in first.headers) == (201, False)
    repeated = await endpoint.post(alice)
    if kind == "invitation":
        assert (repeated.status, repeated.code) == (409, "idempotency_secret")
        assert "token" not in str(repeated.body)
    else:
        assert repeated.headers["Idempotent-Replayed"] == "true"
        expected = (201, first.body) if kind != "job" else (200, first.body | {"duplicate": True})
        assert (repeated.status, repeated.body) == expected
        assert repeated.headers.get("ETag") == first.headers.get("ETag")
    if kind != "job":
        assert repeated.headers["Location"] == first.headers["Location"]
    assert await endpoint.count(alice) == before + 1


@pytest.mark.parametrize("kind", KINDS)
async def test_another_body_under_the_same_key_is_refused(alice: Actor, bob: Actor, kind: str) -> None:
    endpoint = await endpoint_for(kind, alice, bob)
    assert (await endpoint.post(alice)).status == 201
    before = await endpoint.count(alice)
    changed = {"collaborator": {"role": "VIEWER"}, "invitation": {"role": "VIEWER"}, "job": {"priority": 9}}
    field = {"document": {"path": "other.py"}, **changed}.get(kind, {"name": "Other"})
    refused = await endpoint.post(alice, **field)
    assert (refused.status, refused.code) == (422, "idempotency_key_reused")
    assert await endpoint.count(alice) == before


async def test_a_key_belongs_to_its_user_and_route(alice: Actor, bob: Actor) -> None:
    project = await endpoint_for("project", alice, bob)
    assert (await project.post(alice)).status == 201
    response = await project.post(bob)
    assert (response.status, "Idempotent-Replayed" in response.headers) == (201, False)
    workspace = await endpoint_for("workspace", alice, bob)
    assert (await workspace.post(alice)).status == 201  # the same key on another route


async def test_a_key_of_one_workspace_is_refused_in_another(alice: Actor, bob: Actor) -> None:
    here, there = [await endpoint_for("document", alice, bob) for _ in range(2)]
    assert (await here.post(alice)).status == 201
    refused = await there.post(alice)
    assert (refused.status, refused.code) == (422, "idempotency_key_reused")


async def test_a_body_with_another_order_of_keys_or_explicit_defaults_is_the_same_body(alice: Actor) -> None:
    headers = {"Idempotency-Key": KEY}
    first = await alice.post("/projects", {"name": "x", "settings": {"a": 1, "b": 2}}, headers=headers)
    body = {"settings": {"b": 2, "a": 1}, "description": "", "name": " x "}
    repeated = await alice.post("/projects", body, headers=headers)
    assert (repeated.status, repeated.body) == (201, first.body)


async def test_a_repeated_post_is_authorized_like_a_first_one(alice: Actor, bob: Actor) -> None:
    project = await alice.make_project()
    member = await alice.add(bob, project)
    endpoint = CreateEndpoint(
        "/workspaces", {"projectId": project, "name": "W"}, count_items(f"/workspaces/project/{project}")
    )
    assert (await endpoint.post(bob)).status == 201
    await alice.patch(f"/projects/{project}/collaborators/{member}", {"role": "VIEWER"})
    assert (await endpoint.post(bob)).code == "forbidden"
    await alice.delete(f"/projects/{project}/collaborators/{member}")
    assert (await endpoint.post(bob)).code == "not_found"
    await bob.post("/auth/logout")
    assert (await endpoint.post(bob)).code == "unauthenticated"


async def test_an_error_releases_its_key(alice: Actor, bob: Actor) -> None:
    endpoint = await endpoint_for("document", alice, bob)
    existing = (await alice.post(endpoint.path, {"path": "main.py"}))["id"]
    for _ in range(2):
        assert (await endpoint.post(alice)).code == "path_taken"
    await alice.delete(f"/documents/{existing}")
    created = await endpoint.post(alice)
    assert (created.status, "Idempotent-Replayed" in created.headers) == (201, False)
    collaborators = await endpoint_for("collaborator", alice, bob)
    await alice.post(collaborators.path, collaborators.body)
    assert (await collaborators.post(alice)).code == "already_collaborator"


@pytest.mark.parametrize("key", ["", " ", "a b", "a" * 256, "\u00e9", "a\tb"])
async def test_an_invalid_key_is_refused(alice: Actor, bob: Actor, key: str) -> None:
    for kind in ("project", "job"):
        endpoint = await endpoint_for(kind, alice, bob)
        refused = await endpoint.post(alice, key)
        assert (refused.status, refused.code) == (422, "validation_failed"), kind
        assert refused["details"][0]["field"] == "Idempotency-Key"
        assert await endpoint.count(alice) == 0
    refused = await alice.post("/jobs", {**program_job(), "idempotencyKey": key})
    assert (refused.status, refused["details"][0]["field"]) == (422, "idempotencyKey")


async def test_the_longest_and_strangest_valid_keys_are_accepted(alice: Actor) -> None:
    for key in ("!" * 255, '"8e03978e-40d5-43dd-bc93-6894a57f9324"', "~:/?#[]@!$&'()*+,;=%"):
        headers = {"Idempotency-Key": key}
        first = await alice.post("/projects", {"name": "x"}, headers=headers)
        repeated = await alice.post("/projects", {"name": "x"}, headers=headers)
        assert (first.status, repeated.status, repeated["id"]) == (201, 201, first["id"])


async def test_only_the_first_request_is_broadcast_to_the_room(alice: Actor, bob: Actor) -> None:
    endpoint = await endpoint_for("document", alice, bob)
    room = await alice.connect(endpoint.path.split("/")[2])
    first = await endpoint.post(alice)
    await room.assert_push("DOCUMENT_CREATED", documentId=first["id"])
    assert (await endpoint.post(alice)).status == 201
    await room.refute_push()


async def test_fifty_posts_with_one_key_through_two_servers_have_one_effect(
    processes: Processes, http: aiohttp.ClientSession
) -> None:
    here, there = processes.server(), processes.server()
    alice = await Actor(http, here.base, "Alice").register()
    bob = await Actor(http, there.base, "Bob").register()
    twins = [alice, alice.at(there.base)]
    for kind in KINDS:
        endpoint = await endpoint_for(kind, alice, bob)
        before = await endpoint.count(alice)
        answers = await asyncio.gather(*(endpoint.post_until_acknowledged(twins[n % 2], kind) for n in range(50)))
        assert await endpoint.count(alice) == before + 1, kind
        check_answers(kind, answers)


def check_answers(kind: str, answers: list[Response]) -> None:
    """Check that at most one response is the first, and that all others replay it."""
    first = [answer for answer in answers if answer.status == 201 and "Idempotent-Replayed" not in answer.headers]
    replays = [answer for answer in answers if answer not in first]
    assert len(first) <= 1, kind  # none if its response was lost as a 503
    if kind == "invitation":
        assert {(answer.status, answer.code) for answer in replays} == {(409, "idempotency_secret")}
    else:
        assert {answer.headers["Idempotent-Replayed"] for answer in replays} == {"true"}, kind
        assert len({str(answer.body.get("job", answer.body)) for answer in answers}) == 1, kind
    assert kind == "job" or len({answer.headers["Location"] for answer in answers}) == 1


@asynccontextmanager
async def locked_user(database_url: str, actor: Actor) -> AsyncIterator[None]:
    """Lock the row of a user, which blocks the user from becoming the owner of a project."""
    connection = await asyncpg.connect(database_url)
    try:
        async with connection.transaction():
            await connection.execute("SELECT FROM users WHERE id = $1::text::uuid FOR UPDATE", actor.id)
            yield
    finally:
        await connection.close()


async def test_a_repeat_waits_for_the_first_request_and_gets_its_response(
    alice: Actor, bob: Actor, make_server: MakeServer, database_url: str
) -> None:
    endpoint, there = await endpoint_for("project", alice, bob), alice.at(await make_server())
    async with locked_user(database_url, alice):
        requests = [asyncio.ensure_future(endpoint.post(alice))]
        await wait_until_blocked(database_url, statements=1)
        requests.append(asyncio.ensure_future(endpoint.post(there)))
        await wait_until_blocked(database_url, statements=2)
    first, repeated = await asyncio.gather(*requests)
    assert (first.status, repeated.status, repeated.body) == (201, 201, first.body)
    assert repeated.headers["Idempotent-Replayed"] == "true"


async def test_a_repeat_of_a_request_that_takes_too_long_is_refused_as_in_progress(
    alice: Actor, bob: Actor, database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("server.rest.idempotency.RESPONSE_RESERVE_SECONDS", RELAXED_TIMEOUT_SECONDS - 0.5)
    endpoint = await endpoint_for("project", alice, bob)
    claimed = "INSERT INTO idempotency_keys (user_id, route, key, body_hash) VALUES ($1::text::uuid, $2, $3, '')"
    connection = await asyncpg.connect(database_url)
    try:
        async with connection.transaction():
            await connection.execute(claimed, alice.id, "POST /api/v1/projects", KEY)
            refused = await endpoint.post(alice)
            assert (refused.status, refused.code) == (409, "idempotency_in_progress")
            await connection.execute("DELETE FROM idempotency_keys WHERE user_id = $1::text::uuid", alice.id)
    finally:
        await connection.close()
    assert (await endpoint.post(alice)).status == 201


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "job"])
async def test_a_request_whose_response_cannot_be_stored_has_no_effect(
    alice: Actor, bob: Actor, database_url: str, kind: str
) -> None:
    endpoint = await endpoint_for(kind, alice, bob)
    before = await endpoint.count(alice)
    connection = await asyncpg.connect(database_url)
    guard = f"alice_{alice.id.replace('-', '')}"
    try:
        await connection.execute(
            f"ALTER TABLE idempotency_keys ADD CONSTRAINT {guard} CHECK (user_id <> '{alice.id}' OR status IS NULL)"
        )
        assert (await endpoint.post(alice)).status == 500
    finally:
        await connection.execute(f"ALTER TABLE idempotency_keys DROP CONSTRAINT {guard}")
        await connection.close()
    assert await endpoint.count(alice) == before
    assert (await endpoint.post(alice)).status == 201


KILL = "__import__('os').kill(__import__('os').getpid(), 9)"
MOMENTS = {
    "before the commit": f"server.rest.idempotency._body_bytes=lambda answer: {KILL}",
    "after the commit": "server.rest.middlewares._record_request="
    f"lambda request, *_: request.path.endswith('s') and {KILL}",
}


@pytest.mark.parametrize("moment", MOMENTS)
async def test_a_killed_server_leaves_one_effect_and_its_response(
    processes: Processes, alice: Actor, bob: Actor, moment: str
) -> None:
    killed, endpoint = processes.server(override=MOMENTS[moment]), await endpoint_for("project", alice, bob)
    with pytest.raises(aiohttp.ClientError):
        await endpoint.post(alice.at(killed.base))
    killed.wait()
    created = await endpoint.post_until_acknowledged(alice)
    assert created.status == 201
    assert ("Idempotent-Replayed" in created.headers) == (moment == "after the commit")
    assert [project["id"] for project in (await alice.get("/projects"))["items"]] == [created["id"]]


async def test_keys_are_stored_for_a_day(alice: Actor, bob: Actor, database_url: str) -> None:
    endpoint = await endpoint_for("project", alice, bob)
    first = await endpoint.post(alice)
    db = await postgres.connect(database_url, max_size=2)
    try:
        for age, expected in ((timedelta(hours=23), 1), (timedelta(hours=25), 2)):
            age_keys = "UPDATE idempotency_keys SET created_at = now() - $2::interval WHERE user_id = $1::text::uuid"
            await db.execute(age_keys, alice.id, age)
            await delete_expired_keys(db)
            repeated = await endpoint.post(alice)
            assert (repeated["id"] == first["id"]) == (expected == 1)
            assert await endpoint.count(alice) == expected
    finally:
        await db.close()


async def test_a_browser_can_send_a_key_and_read_that_a_response_is_a_replay(
    make_server: MakeServer, make_actor: MakeActor
) -> None:
    page = await make_actor("Page", await make_server(cors_origin=("https://app.example.org",)))
    origin = {"Origin": "https://app.example.org"}
    preflight_headers = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "idempotency-key"}
    preflight = await page.call("OPTIONS", "/projects", headers=origin | preflight_headers)
    assert "IDEMPOTENCY-KEY" in preflight.headers["Access-Control-Allow-Headers"].upper()
    for _ in range(2):
        answer = await page.post("/projects", {"name": "x"}, headers=origin | {"Idempotency-Key": KEY})
    assert {"Idempotent-Replayed", "Location"} <= set(answer.headers["Access-Control-Expose-Headers"].split(","))


# Routes without a key: an email address is registered only once, and a ticket expires after 30 s.
WITHOUT_KEY = {"register", "issue_ticket"}


def test_every_post_that_creates_takes_a_key_and_the_openapi_document_says_so() -> None:
    document = swagger_document()
    for route in (route for table in API for route in table):
        assert isinstance(route, web.RouteDef)
        operation = document["paths"][route.path][route.method.lower()]
        creates = route.method == "POST" and "201" in operation["responses"]
        takes_key = creates and route.handler.__name__ not in WITHOUT_KEY
        assert (idempotency_of(route.handler) is not None) == takes_key, route
        sent = {parameter["name"] for parameter in operation["parameters"] if parameter["in"] == "header"}
        assert ("Idempotency-Key" in sent) == takes_key, route
        assert ("Idempotent-Replayed" in operation["responses"].get("201", {}).get("headers", {})) == takes_key, route
