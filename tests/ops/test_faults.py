"""A store that stops, hangs, is slow or resets connections: responses are in time, name it, and grant no access."""

import asyncio

import pytest

from tests.actors import PASSWORD, Actor, Response
from tests.faults import FaultyNetwork, Mode
from tests.jobs.requests import program_job
from tests.ops.conftest import Scenario

AT_ONCE = 4
AWAY = (Mode.STOPPED, Mode.BLACK_HOLE, Mode.RESET)
POSTGRES, REDIS, MONGO = "database_url", "redis_url", "mongodb_uri"
NAMES = {POSTGRES: "PostgreSQL", REDIS: "Redis", MONGO: "MongoDB"}


def detail_of(store: str, mode: Mode) -> str:
    """Return the detail of a 503 that is caused by a store in this mode."""
    failure = "is unavailable" if mode in (Mode.STOPPED, Mode.RESET) else "did not answer in time"
    return f"{NAMES[store]} {failure}"


def requests_of(who: Actor, scenario: Scenario) -> list[tuple[str, str, object]]:
    """Return at least one request for every store, and for every combination of them."""
    return [
        ("GET", "/auth/profile", None),
        ("GET", "/auth/sessions", None),
        ("GET", "/projects", None),
        ("GET", f"/projects/{scenario.project}", None),
        ("GET", f"/projects/{scenario.project}/activity", None),
        ("POST", "/projects", {"name": "Another"}),
        ("PATCH", f"/projects/{scenario.project}", {"name": "Renamed"}),
        ("POST", f"/projects/{scenario.project}/collaborators", {"email": "eve@example.org", "role": "VIEWER"}),
        ("POST", "/workspaces", {"projectId": scenario.project, "name": "Letters"}),
        ("GET", f"/workspaces/{scenario.workspace}", None),
        ("GET", f"/workspaces/{scenario.workspace}/events", None),
        ("GET", "/jobs", None),
        ("GET", "/jobs/stats", None),
        ("GET", f"/jobs/{scenario.job}", None),
        ("POST", "/jobs", {**program_job("1"), "workspaceId": scenario.workspace}),
        ("POST", "/auth/ws-ticket", None),
        ("POST", "/auth/refresh", {"refreshToken": who.refresh_token}),
        ("POST", "/auth/login", {"email": who.email, "password": PASSWORD}),
    ]


async def ask_all(scenario: Scenario) -> list[tuple[str, Response]]:
    """Return each path with its response, a few at a time: during an outage most of the time is waiting."""
    requests, path_answers = requests_of(scenario.alice, scenario), []
    for start in range(0, len(requests), AT_ONCE):
        batch = requests[start : start + AT_ONCE]
        responses = await asyncio.gather(*(scenario.call(scenario.alice, *request) for request in batch))
        path_answers += [(path, response) for (_, path, _), response in zip(batch, responses, strict=True)]
    return path_answers


@pytest.mark.parametrize("mode", AWAY, ids=lambda mode: mode.name.lower())
@pytest.mark.real_timeouts
@pytest.mark.parametrize("store", [POSTGRES, REDIS, MONGO])
async def test_every_response_is_in_time_and_names_the_store_that_is_down(
    store: str, mode: Mode, network: FaultyNetwork, scenario: Scenario
) -> None:
    await network.stores[store].set_mode(mode)
    paths = []
    for path, response in await ask_all(scenario):
        assert response.status < 500 or response.status == 503, (path, response)
        if response.status == 503:
            assert response["detail"] == detail_of(store, mode), (path, response)
            assert int(response.headers["Retry-After"]) > 0
            paths.append(path)
    assert set(paths) >= NEEDED[store]
    assert not [path for path in paths if path in FREE_OF[store]]


NEEDED = {
    POSTGRES: {"/auth/profile", "/projects", "/auth/login"},
    REDIS: {"/auth/ws-ticket"},
    MONGO: {"/jobs", "/jobs/stats"},
}
FREE_OF = {
    POSTGRES: set[str](),
    REDIS: {"/auth/profile", "/projects", "/auth/login", "/workspaces", "/jobs"},
    MONGO: {"/auth/profile", "/projects", "/auth/login", "/workspaces", "/auth/ws-ticket"},
}


@pytest.mark.real_timeouts
@pytest.mark.parametrize("store", [POSTGRES, REDIS, MONGO])
async def test_every_response_is_in_time_if_a_store_is_slow(
    store: str, network: FaultyNetwork, scenario: Scenario
) -> None:
    await network.stores[store].set_mode(Mode.SLOW)
    for path, response in await ask_all(scenario):
        assert response.status < 500 or response["detail"] == detail_of(store, Mode.SLOW), (path, response)


@pytest.mark.parametrize("mode", [*AWAY, Mode.SLOW], ids=lambda mode: mode.name.lower())
@pytest.mark.real_timeouts
@pytest.mark.parametrize("store", [POSTGRES, REDIS, MONGO])
async def test_outage_grants_no_access(store: str, mode: Mode, network: FaultyNetwork, scenario: Scenario) -> None:
    ended = scenario.alice.at(scenario.alice.base)
    await ended.log_in()
    await ended.post("/auth/logout")
    stranger = Actor(scenario.alice.http, scenario.alice.base, "Nobody")
    await network.stores[store].set_mode(mode)
    paths = (f"/projects/{scenario.project}", f"/workspaces/{scenario.workspace}", f"/jobs/{scenario.job}")
    refusals = {scenario.mallory: (404, 503), ended: (401, 503), stranger: (401,)}
    for who, refused in refusals.items():
        responses = await asyncio.gather(*(scenario.call(who, "GET", path) for path in paths))
        assert all(response.status in refused for response in responses), responses
