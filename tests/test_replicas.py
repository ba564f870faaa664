"""Reads on a real streaming replica: users see their own writes, and permissions come from the primary."""

import asyncio
import tempfile
from collections.abc import Iterator
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path

import pytest

from server import metrics, postgres
from server.deadline import store_deadline
from server.devstack.stack import Stack
from server.postgres import Database
from server.replicas import connect
from tests.actors import Actor
from tests.conftest import MakeActor, MakeServer
from tests.faults import FaultyNetwork, Mode
from tests.replicas import Replica
from tests.timeouts import WAIT_TIMEOUT_SECONDS

ABSENT = "postgresql://nobody:nothing@127.0.0.1:9/workspace"


@pytest.fixture(scope="module")
def module_replica(stack: Stack, database_url: str) -> Iterator[Replica]:
    with tempfile.TemporaryDirectory(prefix="replica-", ignore_cleanup_errors=True) as directory:
        replica = Replica(stack.postgres, Path(directory))
        replica.start()
        yield replica
        replica.kill()


@pytest.fixture
def replica(module_replica: Replica) -> Iterator[Replica]:
    yield module_replica
    module_replica.resume_replay()


@dataclass
class World:
    ada: Actor
    bob: Actor
    project: str
    member: str
    workspace: str

    @property
    def lists(self) -> list[str]:
        """The paths whose reads may use a replica."""
        return [
            f"/projects/{self.project}",
            f"/projects/{self.project}/collaborators",
            f"/workspaces/project/{self.project}",
        ]


@pytest.fixture
async def world(replica: Replica, make_server: MakeServer, make_actor: MakeActor) -> World:
    server = await make_server(database_replica_urls=(replica.url,))
    ada, bob = await make_actor("Ada", server), await make_actor("Bob", server)
    project = await ada.make_project()
    world = World(ada, bob, project, await ada.add(bob, project), await ada.make_workspace(project))
    await replica.catch_up()
    return world


def answered_by(store: str) -> float:
    return metrics.REPLICA_READS.labels(store)._value.get()


async def test_reads_go_to_the_replica(world: World) -> None:
    before = answered_by("replica")
    project, members, workspaces = [await world.ada.get(path) for path in world.lists]
    assert answered_by("replica") == before + 3
    assert [project["workspaces"][0]["id"], workspaces["items"][0]["id"]] == [world.workspace] * 2
    assert {member["user"]["name"] for member in members["items"]} == {"Ada", "Bob"}


async def test_users_see_every_write_while_the_replica_lags(world: World, replica: Replica) -> None:
    replica.pause_replay()
    workspace = await world.ada.make_workspace(world.project)
    renamed = await world.bob.patch("/auth/profile", {"name": "Robert"})
    assert renamed.status == 200
    before = answered_by("primary")
    for actor in (world.ada, world.bob):  # the author, and another user who may have received an event
        project, members, workspaces = [await actor.get(path) for path in world.lists]
        assert workspace in [embedded["id"] for embedded in project["workspaces"]]
        assert workspace in [item["id"] for item in workspaces["items"]]
        assert "Robert" in [member["user"]["name"] for member in members["items"]]
    assert answered_by("primary") > before
    replica.resume_replay()
    await replica.catch_up()
    before = answered_by("replica")
    assert len((await world.ada.get(world.lists[2]))["items"]) == 2
    assert answered_by("replica") == before + 1


async def test_removed_member_sees_nothing_while_the_replica_lags(world: World, replica: Replica) -> None:
    replica.pause_replay()
    assert (await world.ada.delete(f"/projects/{world.project}/collaborators/{world.member}")).status == 204
    for path in world.lists:
        assert (await world.bob.get(path)).status == 404
    assert (await world.bob.get("/projects"))["items"] == []
    assert (await world.ada.delete(f"/projects/{world.project}")).status == 204
    for path in world.lists:
        assert (await world.ada.get(path)).status == 404


async def test_the_text_of_a_version_may_come_from_the_replica(world: World, replica: Replica) -> None:
    created = await world.ada.post(f"/workspaces/{world.workspace}/documents", {"path": "a.txt", "content": "one"})
    document = created["id"]
    newest = (await world.ada.get(f"/documents/{document}/versions"))["items"][0]["version"]
    await replica.catch_up()
    before = answered_by("replica")
    assert (await world.ada.get(f"/documents/{document}/versions/{newest}"))["content"] == "one"
    assert answered_by("replica") == before + 1

    replica.pause_replay()
    written = await world.ada.put(f"/documents/{document}/content", data="two", headers={"If-Match": "*"})
    assert written.status == 200
    version = written["version"]
    assert (await world.ada.get(f"/documents/{document}/versions/{version}"))["content"] == "two"
    assert (await world.ada.get(f"/documents/{document}/versions/{version + 1}")).status == 404


async def test_primary_serves_reads_until_a_killed_replica_is_back(world: World, replica: Replica) -> None:
    replica.kill()
    for _ in range(2):
        for path in world.lists:
            assert (await world.ada.get(path)).status == 200
    replica.start()
    async with asyncio.timeout(WAIT_TIMEOUT_SECONDS):
        before = answered_by("replica")
        while answered_by("replica") == before:
            assert (await world.ada.get(world.lists[1])).status == 200
            await asyncio.sleep(0.1)


@pytest.mark.real_timeouts("replica")
@pytest.mark.parametrize("mode", [Mode.BLACK_HOLE, Mode.SLOW], ids=lambda mode: mode.name.lower())
async def test_hanging_replica_delays_responses_but_fails_none(
    mode: Mode, replica: Replica, make_server: MakeServer, make_actor: MakeActor
) -> None:
    async with FaultyNetwork.start({"replica": replica.url}) as network:
        urls = (network.urls["replica"],)
        ada = await make_actor("Ada", await make_server(database_replica_urls=urls))
        paths = [f"/projects/{await ada.make_project()}{rest}" for rest in ("", "/collaborators")]
        await network.stores["replica"].set_mode(mode)
        for path in paths * 3:
            assert (await ada.get(path)).status == 200


async def test_server_starts_while_its_replica_is_down(make_server: MakeServer, make_actor: MakeActor) -> None:
    server = await make_server(database_replica_urls=(ABSENT,))
    ada = await make_actor("Ada", server)
    project = await ada.make_project()
    assert (await ada.get(f"/projects/{project}/collaborators"))["items"][0]["user"]["name"] == "Ada"


@pytest.mark.real_timeouts("replica")
async def test_request_without_time_left_does_not_open_the_circuit_of_the_replica(own_stack: Stack) -> None:
    async with FaultyNetwork.start({"postgres": own_stack.postgres.url}) as network, AsyncExitStack() as stack:
        primary = await postgres.connect(own_stack.postgres.url)
        stack.push_async_callback(primary.close)
        replicas = await connect(stack, primary, [network.urls["postgres"]])

        async def where(db: Database) -> str:
            return "primary" if db is primary else str(await db.fetchval("SELECT 'replica'"))

        assert await replicas.read(where) == "replica"
        await network.stores["postgres"].set_mode(Mode.SLOW)
        with store_deadline(0.1):
            assert await replicas.read(where) == "primary"
        await network.stores["postgres"].set_mode(Mode.PASS)
        assert await replicas.read(where) == "replica"
        await network.stores["postgres"].set_mode(Mode.BLACK_HOLE)
        assert await replicas.read(where) == "primary"
        await network.stores["postgres"].set_mode(Mode.PASS)
        assert await replicas.read(where) == "primary", "the circuit of the replica is open"
