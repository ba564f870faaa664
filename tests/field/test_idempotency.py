"""What users saw of requests that they repeated: two projects, two documents, two invitations."""

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
from server.rest.idempotency import forget_old
from server.rest.marks import idempotency_of
from tests.actors import Actor, Answer
from tests.auth.test_accounts import until_blocked
from tests.conftest import UNHURRIED_SECONDS, MakeActor, MakeServer
from tests.jobs.asking import program
from tests.processes import Processes

KEY = "order-1815"


class Place:
    """Where things are made: a path, a body, and how many there are afterwards."""

    def __init__(self, path: str, body: dict[str, Any], count: Callable[[Actor], Awaitable[int]]) -> None:
        self.path, self.body, self.count = path, body, count

    async def post(self, actor: Actor, key: str = KEY, **change: Any) -> Answer:
        return await actor.post(self.path, self.body | change, headers={"Idempotency-Key": key})

    async def insistently(self, actor: Actor, key: str = KEY) -> Answer:
        """As clients do: what is answered 503, or is under way, is posted again."""
        while (answer := await self.post(actor, key)).body.get("code") in ("unavailable", "idempotency_in_progress"):
            await asyncio.sleep(0.1)
        return answer


def counting(path: str) -> Callable[[Actor], Awaitable[int]]:
    async def count(actor: Actor) -> int:
        return len((await actor.get(path, params={"limit": "100"}))["items"])

    return count


KINDS = ("project", "workspace", "document", "collaborator", "invitation", "job")


async def place_for(kind: str, alice: Actor, bob: Actor) -> Place:
    if kind == "project":
        return Place("/projects", {"name": "Engine"}, counting("/projects"))
    if kind == "job":
        return Place("/jobs", {**program(), "runAt": "2100-01-01T00:00:00Z"}, counting("/jobs"))
    project = await alice.make_project()
    if kind == "workspace":
        return Place("/workspaces", {"projectId": project, "name": "W"}, counting(f"/workspaces/project/{project}"))
    if kind == "document":
        path = f"/workspaces/{await alice.make_workspace(project)}/documents"
        return Place(path, {"path": "main.py", "content": "1"}, counting(path))
    people = f"/projects/{project}/collaborators"
    if kind == "collaborator":
        return Place(people, {"email": bob.email}, counting(people))
    return Place(people, {"email": f"new-{bob.email}"}, counting(f"/projects/{project}/invitations"))


@pytest.mark.parametrize("kind", KINDS)
async def test_a_repeated_post_made_a_second_one(alice: Actor, bob: Actor, kind: str) -> None:
    place = await place_for(kind, alice, bob)
    before = await place.count(alice)
    first = await place.post(alice)
    assert (first.status, "Idempotent-Replayed" in first.headers) == (201, False)
    again = await place.post(alice)
    if kind == "invitation":
        assert (again.status, again.code) == (409, "idempotency_secret")
        assert "token" not in str(again.body)
    else:
        assert again.headers["Idempotent-Replayed"] == "true"
        same = (201, first.body) if kind != "job" else (200, first.body | {"duplicate": True})
        assert (again.status, again.body) == same
        assert again.headers.get("ETag") == first.headers.get("ETag")
    if kind != "job":
        assert again.headers["Location"] == first.headers["Location"]
    assert await place.count(alice) == before + 1


@pytest.mark.parametrize("kind", KINDS)
async def test_another_body_under_the_same_key_is_refused(alice: Actor, bob: Actor, kind: str) -> None:
    place = await place_for(kind, alice, bob)
    assert (await place.post(alice)).status == 201
    before = await place.count(alice)
    changed = {"collaborator": {"role": "VIEWER"}, "invitation": {"role": "VIEWER"}, "job": {"priority": 9}}
    field = {"document": {"path": "other.py"}, **changed}.get(kind, {"name": "Other"})
    refused = await place.post(alice, **field)
    assert (refused.status, refused.code) == (422, "idempotency_key_reused")
    assert await place.count(alice) == before


async def test_a_key_is_of_its_user_and_route(alice: Actor, bob: Actor) -> None:
    project = await place_for("project", alice, bob)
    assert (await project.post(alice)).status == 201
    theirs = await project.post(bob)
    assert (theirs.status, "Idempotent-Replayed" in theirs.headers) == (201, False)
    workspace = await place_for("workspace", alice, bob)
    assert (await workspace.post(alice)).status == 201  # the same key on another route


async def test_the_same_key_for_another_workspace_gives_nobody_the_document_of_the_first(
    alice: Actor, bob: Actor
) -> None:
    here, there = [await place_for("document", alice, bob) for _ in range(2)]
    assert (await here.post(alice)).status == 201
    refused = await there.post(alice)
    assert (refused.status, refused.code) == (422, "idempotency_key_reused")


async def test_the_order_of_a_body_and_its_defaults_are_no_difference(alice: Actor) -> None:
    headers = {"Idempotency-Key": KEY}
    first = await alice.post("/projects", {"name": "x", "settings": {"a": 1, "b": 2}}, headers=headers)
    body = {"settings": {"b": 2, "a": 1}, "description": "", "name": " x "}
    again = await alice.post("/projects", body, headers=headers)
    assert (again.status, again.body) == (201, first.body)


async def test_a_repeated_post_is_authorized_like_a_first_one(alice: Actor, bob: Actor) -> None:
    project = await alice.make_project()
    member = await alice.add(bob, project)
    place = Place("/workspaces", {"projectId": project, "name": "W"}, counting(f"/workspaces/project/{project}"))
    assert (await place.post(bob)).status == 201
    await alice.patch(f"/projects/{project}/collaborators/{member}", {"role": "VIEWER"})
    assert (await place.post(bob)).code == "forbidden"
    await alice.delete(f"/projects/{project}/collaborators/{member}")
    assert (await place.post(bob)).code == "not_found"
    await bob.post("/auth/logout")
    assert (await place.post(bob)).code == "unauthenticated"


async def test_an_error_frees_its_key(alice: Actor, bob: Actor) -> None:
    place = await place_for("document", alice, bob)
    taken = (await alice.post(place.path, {"path": "main.py"}))["id"]
    for _ in range(2):
        assert (await place.post(alice)).code == "path_taken"
    await alice.delete(f"/documents/{taken}")
    made = await place.post(alice)
    assert (made.status, "Idempotent-Replayed" in made.headers) == (201, False)
    people = await place_for("collaborator", alice, bob)
    await alice.post(people.path, people.body)
    assert (await people.post(alice)).code == "already_collaborator"


@pytest.mark.parametrize("key", ["", " ", "a b", "a" * 256, "\u00e9", "a\tb"])
async def test_what_is_no_key_is_refused(alice: Actor, bob: Actor, key: str) -> None:
    for kind in ("project", "job"):
        place = await place_for(kind, alice, bob)
        refused = await place.post(alice, key)
        assert (refused.status, refused.code) == (422, "validation_failed"), kind
        assert refused["details"][0]["field"] == "Idempotency-Key"
        assert await place.count(alice) == 0
    refused = await alice.post("/jobs", {**program(), "idempotencyKey": key})
    assert (refused.status, refused["details"][0]["field"]) == (422, "idempotencyKey")


async def test_the_longest_and_strangest_keys_are_taken(alice: Actor) -> None:
    for key in ("!" * 255, '"8e03978e-40d5-43dd-bc93-6894a57f9324"', "~:/?#[]@!$&'()*+,;=%"):
        headers = {"Idempotency-Key": key}
        first = await alice.post("/projects", {"name": "x"}, headers=headers)
        again = await alice.post("/projects", {"name": "x"}, headers=headers)
        assert (first.status, again.status, again["id"]) == (201, 201, first["id"])


async def test_only_the_first_is_told_to_the_others(alice: Actor, bob: Actor) -> None:
    place = await place_for("document", alice, bob)
    room = await alice.connect(place.path.split("/")[2])
    first = await place.post(alice)
    await room.assert_push("DOCUMENT_CREATED", documentId=first["id"])
    assert (await place.post(alice)).status == 201
    await room.refute_push()


async def test_fifty_posts_with_one_key_through_two_servers_have_one_effect(
    processes: Processes, http: aiohttp.ClientSession
) -> None:
    here, there = processes.server(), processes.server()
    alice = await Actor(http, here.base, "Alice").register()
    bob = await Actor(http, there.base, "Bob").register()
    twins = [alice, alice.at(there.base)]
    for kind in KINDS:
        place = await place_for(kind, alice, bob)
        before = await place.count(alice)
        answers = await asyncio.gather(*(place.insistently(twins[n % 2], kind) for n in range(50)))
        assert await place.count(alice) == before + 1, kind
        check_answers(kind, answers)


def check_answers(kind: str, answers: list[Answer]) -> None:
    """One is the first, and all others repeat it."""
    first = [answer for answer in answers if answer.status == 201 and "Idempotent-Replayed" not in answer.headers]
    others = [answer for answer in answers if answer not in first]
    assert len(first) <= 1, kind  # none where its answer was lost, as a 503
    if kind == "invitation":
        assert {(answer.status, answer.code) for answer in others} == {(409, "idempotency_secret")}
    else:
        assert {answer.headers["Idempotent-Replayed"] for answer in others} == {"true"}, kind
        assert len({str(answer.body.get("job", answer.body)) for answer in answers}) == 1, kind
    assert kind == "job" or len({answer.headers["Location"] for answer in answers}) == 1


@asynccontextmanager
async def locked(database_url: str, actor: Actor) -> AsyncIterator[None]:
    """While the row of a user is locked, they can become the owner of no project."""
    connection = await asyncpg.connect(database_url)
    try:
        async with connection.transaction():
            await connection.execute("SELECT FROM users WHERE id = $1::text::uuid FOR UPDATE", actor.id)
            yield
    finally:
        await connection.close()


async def test_a_repeat_waits_for_the_first_and_gets_its_answer(
    alice: Actor, bob: Actor, make_server: MakeServer, database_url: str
) -> None:
    place, there = await place_for("project", alice, bob), alice.at(await make_server())
    async with locked(database_url, alice):
        calls = [asyncio.ensure_future(place.post(alice))]
        await until_blocked(database_url, statements=1)
        calls.append(asyncio.ensure_future(place.post(there)))
        await until_blocked(database_url, statements=2)
    first, again = await asyncio.gather(*calls)
    assert (first.status, again.status, again.body) == (201, 201, first.body)
    assert again.headers["Idempotent-Replayed"] == "true"


async def test_a_repeat_of_a_first_that_takes_too_long_is_told_so(
    alice: Actor, bob: Actor, database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("server.rest.idempotency.ANSWER_SECONDS", UNHURRIED_SECONDS - 0.5)
    place = await place_for("project", alice, bob)
    claimed = "INSERT INTO idempotency_keys (user_id, route, key, body_hash) VALUES ($1::text::uuid, $2, $3, '')"
    connection = await asyncpg.connect(database_url)
    try:
        async with connection.transaction():
            await connection.execute(claimed, alice.id, "POST /api/v1/projects", KEY)
            refused = await place.post(alice)
            assert (refused.status, refused.code) == (409, "idempotency_in_progress")
            await connection.execute("DELETE FROM idempotency_keys WHERE user_id = $1::text::uuid", alice.id)
    finally:
        await connection.close()
    assert (await place.post(alice)).status == 201


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "job"])
async def test_an_effect_whose_answer_cannot_be_kept_is_none(
    alice: Actor, bob: Actor, database_url: str, kind: str
) -> None:
    place = await place_for(kind, alice, bob)
    before = await place.count(alice)
    connection = await asyncpg.connect(database_url)
    guard = f"alice_{alice.id.replace('-', '')}"
    try:
        await connection.execute(
            f"ALTER TABLE idempotency_keys ADD CONSTRAINT {guard} CHECK (user_id <> '{alice.id}' OR status IS NULL)"
        )
        assert (await place.post(alice)).status == 500
    finally:
        await connection.execute(f"ALTER TABLE idempotency_keys DROP CONSTRAINT {guard}")
        await connection.close()
    assert await place.count(alice) == before
    assert (await place.post(alice)).status == 201


DIE = "__import__('os').kill(__import__('os').getpid(), 9)"
MOMENTS = {
    "before the commit": f"server.rest.idempotency._bytes=lambda answer: {DIE}",
    "after the commit": f"server.rest.middlewares._record=lambda request, *_: request.path.endswith('s') and {DIE}",
}


@pytest.mark.parametrize("moment", MOMENTS)
async def test_a_server_that_is_killed_leaves_one_effect_and_its_answer(
    processes: Processes, alice: Actor, bob: Actor, moment: str
) -> None:
    dying, place = processes.server(shorter=MOMENTS[moment]), await place_for("project", alice, bob)
    with pytest.raises(aiohttp.ClientError):
        await place.post(alice.at(dying.base))
    dying.wait()
    made = await place.insistently(alice)
    assert made.status == 201
    assert ("Idempotent-Replayed" in made.headers) == (moment == "after the commit")
    assert [each["id"] for each in (await alice.get("/projects"))["items"]] == [made["id"]]


async def test_keys_are_kept_for_a_day(alice: Actor, bob: Actor, database_url: str) -> None:
    place = await place_for("project", alice, bob)
    first = await place.post(alice)
    db = await postgres.connect(database_url, size=2)
    try:
        for age, expected in ((timedelta(hours=23), 1), (timedelta(hours=25), 2)):
            aged = "UPDATE idempotency_keys SET created_at = now() - $2::interval WHERE user_id = $1::text::uuid"
            await db.execute(aged, alice.id, age)
            await forget_old(db)
            again = await place.post(alice)
            assert (again["id"] == first["id"]) == (expected == 1)
            assert await place.count(alice) == expected
    finally:
        await db.close()


async def test_a_browser_sends_a_key_and_sees_that_an_answer_is_a_replay(
    make_server: MakeServer, make_actor: MakeActor
) -> None:
    page = await make_actor("Page", await make_server(cors_origin=("https://app.example.org",)))
    origin = {"Origin": "https://app.example.org"}
    asked = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "idempotency-key"}
    leave = await page.call("OPTIONS", "/projects", headers=origin | asked)
    assert "IDEMPOTENCY-KEY" in leave.headers["Access-Control-Allow-Headers"].upper()
    for _ in range(2):
        answer = await page.post("/projects", {"name": "x"}, headers=origin | {"Idempotency-Key": KEY})
    assert {"Idempotent-Replayed", "Location"} <= set(answer.headers["Access-Control-Expose-Headers"].split(","))


MAKES_NO_THING_TWICE = {"register", "issue_ticket"}  # an address is taken once; a ticket lives for 30 s


def test_every_post_that_creates_takes_a_key_and_the_document_says_so() -> None:
    document = swagger_document()
    for route in (route for table in API for route in table):
        assert isinstance(route, web.RouteDef)
        operation = document["paths"][route.path][route.method.lower()]
        creates = route.method == "POST" and "201" in operation["responses"]
        takes_key = creates and route.handler.__name__ not in MAKES_NO_THING_TWICE
        assert (idempotency_of(route.handler) is not None) == takes_key, route
        sent = {each["name"] for each in operation["parameters"] if each["in"] == "header"}
        assert ("Idempotency-Key" in sent) == takes_key, route
        assert ("Idempotent-Replayed" in operation["responses"].get("201", {}).get("headers", {})) == takes_key, route
