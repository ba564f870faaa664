"""Fixtures of servers whose stores fail."""

from collections.abc import AsyncIterator
from dataclasses import dataclass

import pytest

from server.devstack.stack import Stack
from tests.actors import Actor
from tests.conftest import MakeActor, MakeServer, addresses_of
from tests.faults import Network
from tests.jobs.asking import program


@pytest.fixture
async def network(stack: Stack, database_url: str) -> AsyncIterator[Network]:
    async with Network.to(addresses_of(stack)) as network:
        yield network


@dataclass
class World:
    """Alice's project, workspace and job; Mallory is a member of nothing."""

    alice: Actor
    mallory: Actor
    project: str
    workspace: str
    job: str


@pytest.fixture
async def world(network: Network, make_server: MakeServer, make_actor: MakeActor) -> World:
    base = await make_server(**network.urls, rate_limit_default=None)
    alice, mallory = await make_actor("Alice", base), await make_actor("Mallory", base)
    project = await alice.make_project()
    workspace = await alice.make_workspace(project)
    job = (await alice.post("/jobs", {**program("1"), "runAt": "2100-01-01T00:00:00Z"}))["job"]["id"]
    return World(alice, mallory, project, workspace, job)
