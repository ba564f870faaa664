"""The cache of projects: it saves statements, is never stale in any process, and is not required."""

import asyncio
from uuid import UUID, uuid4

import aiohttp
import asyncpg
import pytest

from server import json, postgres
from server.devstack.stack import Stack
from server.projects import cache
from tests.actors import Actor
from tests.conftest import MakeServer, store_urls_of
from tests.timeouts import WAIT_TIMEOUT_SECONDS


async def test_change_by_one_server_is_visible_on_the_others(alice: Actor, bob: Actor, make_server: MakeServer) -> None:
    project = await alice.make_project(bob)
    other = alice.at(await make_server())
    for number in range(20):
        await other.get(f"/projects/{project}")  # fills the cache of that server
        await alice.patch(f"/projects/{project}", {"name": f"name {number}"})
        assert (await other.get(f"/projects/{project}"))["name"] == f"name {number}"
        assert (await bob.at(other.base).get(f"/projects/{project}"))["role"] == "COLLABORATOR"


async def test_list_and_project_agree_after_every_change(
    alice: Actor, bob: Actor, carol: Actor, make_server: MakeServer
) -> None:
    project, there = await alice.make_project(bob, name="Engine"), await make_server()
    path = f"/projects/{project}"

    async def compare() -> None:
        for actor in (alice, bob):
            whole = (await actor.get(path)).body
            del whole["workspaces"], whole["collaborators"]
            for base in (alice.base, there):
                assert (await actor.at(base).get("/projects"))["items"] == [whole]

    await compare()
    await alice.patch(path, {"description": "of brass", "settings": {"tabs": 4}})
    await compare()
    workspace = await bob.make_workspace(project)
    await compare()
    await bob.delete(f"/workspaces/{workspace}")
    await compare()
    await alice.add(carol, project)
    await compare()
    await alice.patch("/auth/profile", {"name": "Alicia"})
    await compare()
    await carol.delete("/auth/profile", {"password": carol.password})
    await compare()


@pytest.mark.parametrize("read_all", [False, True])
async def test_concurrent_readers_never_see_an_older_state(
    alice: Actor, make_server: MakeServer, read_all: bool
) -> None:
    project = await alice.make_project(name="0")
    there = alice.at(await make_server())
    written = 0

    async def read() -> None:
        last = 0
        while written < 40:
            known = written
            seen = (await there.get("/projects"))["items"][0] if read_all else await there.get(f"/projects/{project}")
            name = int(seen["name"])
            assert name >= max(known, last)
            last = name

    async def write() -> None:
        nonlocal written
        for number in range(1, 41):
            await alice.patch(f"/projects/{project}", {"name": str(number)})
            written = number

    await asyncio.gather(write(), *(read() for _ in range(4)))


@pytest.fixture
def statements(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The statements of servers in this process, without those about sessions: a young Redis is not trusted."""
    queries: list[str] = []

    def count(name: str) -> None:
        run = getattr(postgres.Database, name)

        async def counted(self: postgres.Database, query: str, *args: object) -> object:
            if "sessions" not in query:
                queries.append(query)
            return await run(self, query, *args)

        monkeypatch.setattr(postgres.Database, name, counted)

    for name in ("fetchrow_batched", "fetch", "fetchrow"):
        count(name)
    return queries


async def test_repeated_list_costs_one_statement_until_the_cache_expires(
    alice: Actor, statements: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    projects = [await alice.make_project() for _ in range(3)]
    statements.clear()
    first = await alice.get("/projects")
    assert len(statements) == 2
    assert (await alice.get("/projects")).body == first.body
    assert len(statements) == 3
    await alice.patch(f"/projects/{projects[0]}", {"name": "changed"})
    statements.clear()
    assert (await alice.get("/projects"))["items"][0]["name"] == "changed"
    assert len(statements) == 2
    monkeypatch.setattr("server.projects.cache.CACHE_TTL_SECONDS", -1)
    await alice.get("/projects")
    assert len(statements) == 4


async def test_project_deleted_since_it_was_listed_is_left_out(alice: Actor, database_url: str) -> None:
    existing, deleted = UUID(await alice.make_project()), uuid4()
    db = await postgres.connect(database_url)
    rows = [{"id": id, "revision": 1, "role": "OWNER"} for id in (deleted, existing)]
    fragments = await cache.ProjectListCache().render(db, rows)
    await db.close()
    assert [project["id"] for project in json.loads(json.dumps(fragments))] == [str(existing)]


async def test_a_second_reader_costs_one_statement(alice: Actor, statements: list[str]) -> None:
    project = await alice.make_project()
    statements.clear()
    first = await alice.get(f"/projects/{project}")
    assert len(statements) == 2
    second = await alice.get(f"/projects/{project}")
    assert len(statements) == 3  # only the access query, which returns the revision
    assert second.body == first.body


async def test_projects_are_readable_without_redis(
    http: aiohttp.ClientSession, own_stack: Stack, make_server: MakeServer
) -> None:
    ada = await Actor(http, await make_server(**store_urls_of(own_stack)), "Ada").register()
    project = await ada.make_project()
    own_stack.valkey.kill()
    for _ in range(3):
        async with asyncio.timeout(WAIT_TIMEOUT_SECONDS):
            assert (await ada.get(f"/projects/{project}")).status == 200


async def test_member_who_changes_their_name_while_joining_is_shown_by_the_new_one(
    alice: Actor, bob: Actor, database_url: str
) -> None:
    project = await alice.make_project()
    db = await asyncpg.connect(database_url)
    try:
        async with db.transaction():
            await db.execute("UPDATE users SET name = 'Robert' WHERE id = $1", bob.id)
            joining = asyncio.ensure_future(alice.add(bob, project))
            await asyncio.wait({joining}, timeout=0.5)
            await alice.get(f"/projects/{project}")  # fills the cache, with the member if Bob has joined by now
    finally:
        await db.close()
    await joining
    members = (await alice.get(f"/projects/{project}"))["collaborators"]
    assert [member["user"]["name"] for member in members] == ["Alice", "Robert"]
