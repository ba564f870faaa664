"""Fixtures of servers whose stores fail.

Only the full form, on a machine without other load, requires every response within 2 s: there a request has its real
deadline.
"""

import asyncio
from collections.abc import AsyncIterator
from dataclasses import dataclass

import pytest

from server.devstack.stack import Stack
from server.rest.middlewares import STORE_DEADLINE_SECONDS as BUDGET_SECONDS
from tests.actors import Actor, Response
from tests.conftest import REQUEST_TIMEOUT_NAME, MakeActor, MakeServer, store_urls_of
from tests.faults import FaultyNetwork
from tests.jobs.requests import program_job
from tests.timeouts import WAIT_TIMEOUT_SECONDS


@pytest.fixture
async def network(stack: Stack, database_url: str) -> AsyncIterator[FaultyNetwork]:
    async with FaultyNetwork.start(store_urls_of(stack)) as network:
        yield network


PROMISED_SECONDS = 2.0


@pytest.fixture
def response_timeout_seconds(full: bool, monkeypatch: pytest.MonkeyPatch) -> float:
    """The longest time that a response may take."""
    if not full:
        return WAIT_TIMEOUT_SECONDS
    monkeypatch.setattr(REQUEST_TIMEOUT_NAME, BUDGET_SECONDS)
    return PROMISED_SECONDS


@dataclass
class Scenario:
    """Alice with a project, a workspace and a job; Mallory is not a member of any project."""

    alice: Actor
    mallory: Actor
    project: str
    workspace: str
    job: str
    response_timeout_seconds: float

    async def call(self, who: Actor, method: str, path: str, body: object = None) -> Response:
        """Return the response, or raise TimeoutError after ``response_timeout_seconds``."""
        async with asyncio.timeout(self.response_timeout_seconds):
            return await who.call(method, path, body)


@pytest.fixture
async def scenario(
    network: FaultyNetwork, make_server: MakeServer, make_actor: MakeActor, response_timeout_seconds: float
) -> Scenario:
    base = await make_server(**network.urls, rate_limit_default=None)
    alice, mallory = await make_actor("Alice", base), await make_actor("Mallory", base)
    project = await alice.make_project()
    workspace = await alice.make_workspace(project)
    job = (await alice.post("/jobs", {**program_job("1"), "runAt": "2100-01-01T00:00:00Z"}))["job"]["id"]
    return Scenario(alice, mallory, project, workspace, job, response_timeout_seconds)
