"""Fixtures of servers whose stores fail.

Only the full form, on a machine without other load, requires every response within 2 s: there a request has its real
deadline.
"""

import asyncio
from collections.abc import AsyncIterator
from dataclasses import dataclass

import pytest

from server.devstack.stack import Stack
from server.rest.middlewares import STORES_SECONDS as BUDGET_SECONDS
from tests.actors import Actor, Answer
from tests.conftest import OF_A_REQUEST, MakeActor, MakeServer, addresses_of
from tests.faults import Network
from tests.jobs.asking import program
from tests.patience import PATIENCE_SECONDS


@pytest.fixture
async def network(stack: Stack, database_url: str) -> AsyncIterator[Network]:
    async with Network.to(addresses_of(stack)) as network:
        yield network


PROMISED_SECONDS = 2.0


@pytest.fixture
def longest_seconds(full: bool, monkeypatch: pytest.MonkeyPatch) -> float:
    """The longest time that a response may take."""
    if not full:
        return PATIENCE_SECONDS
    monkeypatch.setattr(OF_A_REQUEST, BUDGET_SECONDS)
    return PROMISED_SECONDS


@dataclass
class World:
    """Alice with a project, a workspace and a job; Mallory is not a member of any project."""

    alice: Actor
    mallory: Actor
    project: str
    workspace: str
    job: str
    longest_seconds: float

    async def call(self, who: Actor, method: str, path: str, body: object = None) -> Answer:
        """Return the response, or raise TimeoutError after ``response_timeout_seconds``."""
        async with asyncio.timeout(self.longest_seconds):
            return await who.call(method, path, body)


@pytest.fixture
async def world(network: Network, make_server: MakeServer, make_actor: MakeActor, longest_seconds: float) -> World:
    base = await make_server(**network.urls, rate_limit_default=None)
    alice, mallory = await make_actor("Alice", base), await make_actor("Mallory", base)
    project = await alice.make_project()
    workspace = await alice.make_workspace(project)
    job = (await alice.post("/jobs", {**program("1"), "runAt": "2100-01-01T00:00:00Z"}))["job"]["id"]
    return World(alice, mallory, project, workspace, job, longest_seconds)
