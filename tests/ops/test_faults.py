"""A store stops, falls silent, is slow or hangs up: answers come in time, name it, and let nobody in."""

import time

import pytest

from tests.actors import PASSWORD, Actor, Answer
from tests.faults import Mode, Network
from tests.jobs.asking import program
from tests.ops.conftest import World

LONGEST_SECONDS = 2.0
AWAY = (Mode.STOPPED, Mode.BLACK_HOLE, Mode.RESET)
POSTGRES, REDIS, MONGO = "database_url", "redis_url", "mongodb_uri"
NAMES = {POSTGRES: "PostgreSQL", REDIS: "Redis", MONGO: "MongoDB"}


def calls(who: Actor, world: World) -> list[tuple[str, str, object]]:
    """At least one call for every store, and every combination of them."""
    return [
        ("GET", "/auth/profile", None),
        ("GET", "/auth/sessions", None),
        ("GET", "/projects", None),
        ("GET", f"/projects/{world.project}", None),
        ("GET", f"/projects/{world.project}/activity", None),
        ("POST", "/projects", {"name": "Another"}),
        ("PATCH", f"/projects/{world.project}", {"name": "Renamed"}),
        ("POST", f"/projects/{world.project}/collaborators", {"email": "eve@example.org", "role": "VIEWER"}),
        ("POST", "/workspaces", {"projectId": world.project, "name": "Letters"}),
        ("GET", f"/workspaces/{world.workspace}", None),
        ("GET", f"/workspaces/{world.workspace}/events", None),
        ("GET", "/jobs", None),
        ("GET", "/jobs/stats", None),
        ("GET", f"/jobs/{world.job}", None),
        ("POST", "/jobs", {**program("1"), "workspaceId": world.workspace}),
        ("POST", "/auth/ws-ticket", None),
        ("POST", "/auth/refresh", {"refreshToken": who.refresh_token}),
        ("POST", "/auth/login", {"email": who.email, "password": PASSWORD}),
    ]


async def timed(who: Actor, method: str, path: str, body: object = None) -> Answer:
    began = time.monotonic()
    answer = await who.call(method, path, body)
    took = time.monotonic() - began
    assert took < LONGEST_SECONDS, f"{method} {path}: {answer.status} after {took:.2f} s"
    return answer


@pytest.mark.parametrize("mode", AWAY, ids=lambda mode: mode.name.lower())
@pytest.mark.parametrize("store", [POSTGRES, REDIS, MONGO])
async def test_every_answer_comes_in_time_and_names_what_is_away(
    store: str, mode: Mode, network: Network, world: World
) -> None:
    await network.stores[store].turn(mode)
    told = []
    for method, path, body in calls(world.alice, world):
        answer = await timed(world.alice, method, path, body)
        assert answer.status < 500 or answer.status == 503, (path, answer)
        if answer.status == 503:
            assert NAMES[store] in answer["detail"], (path, answer)
            assert int(answer.headers["Retry-After"]) > 0
            told.append(path)
    assert set(told) >= NEEDED[store]
    assert not [path for path in told if path in FREE_OF[store]]


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


@pytest.mark.parametrize("store", [POSTGRES, REDIS, MONGO])
async def test_every_answer_comes_in_time_where_a_store_is_slow(store: str, network: Network, world: World) -> None:
    await network.stores[store].turn(Mode.SLOW)
    for method, path, body in calls(world.alice, world):
        answer = await timed(world.alice, method, path, body)
        assert answer.status < 500 or (answer.status == 503 and NAMES[store] in answer["detail"]), (path, answer)


@pytest.mark.parametrize("mode", [*AWAY, Mode.SLOW], ids=lambda mode: mode.name.lower())
@pytest.mark.parametrize("store", [POSTGRES, REDIS, MONGO])
async def test_nobody_is_let_in_by_a_failure(
    store: str, mode: Mode, network: Network, world: World, full: bool
) -> None:
    if mode is not AWAY[0] and not full:
        pytest.skip("one way of failing is enough for every run; all of them: --full")
    ended = world.alice.at(world.alice.base)
    await ended.log_in()
    await ended.post("/auth/logout")
    stranger = Actor(world.alice.http, world.alice.base, "Nobody")
    await network.stores[store].turn(mode)
    paths = (f"/projects/{world.project}", f"/workspaces/{world.workspace}", f"/jobs/{world.job}")
    for path in paths:
        assert (await timed(world.mallory, "GET", path)).status in (404, 503), path
        assert (await timed(ended, "GET", path)).status in (401, 503), path
        assert (await timed(stranger, "GET", path)).status == 401, path
