"""A store stops, falls silent, is slow or hangs up: answers come in time, name it, and let nobody in."""

import asyncio

import pytest

from tests.actors import PASSWORD, Actor, Answer
from tests.faults import Mode, Network
from tests.jobs.asking import program
from tests.ops.conftest import World

AT_ONCE = 4
AWAY = (Mode.STOPPED, Mode.BLACK_HOLE, Mode.RESET)
POSTGRES, REDIS, MONGO = "database_url", "redis_url", "mongodb_uri"
NAMES = {POSTGRES: "PostgreSQL", REDIS: "Redis", MONGO: "MongoDB"}


def detail_of(store: str, mode: Mode) -> str:
    """Return the detail of a 503 because of a store that behaves like this."""
    failure = "is unavailable" if mode in (Mode.STOPPED, Mode.RESET) else "did not answer in time"
    return f"{NAMES[store]} {failure}"


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


async def all_asked(world: World) -> list[tuple[str, Answer]]:
    """Each path and its answer, some at a time: where a store is away most of it is waiting."""
    asked, found = calls(world.alice, world), []
    for start in range(0, len(asked), AT_ONCE):
        some = asked[start : start + AT_ONCE]
        answers = await asyncio.gather(*(world.call(world.alice, *each) for each in some))
        found += [(path, answer) for (_, path, _), answer in zip(some, answers, strict=True)]
    return found


@pytest.mark.parametrize("mode", AWAY, ids=lambda mode: mode.name.lower())
@pytest.mark.hurried
@pytest.mark.parametrize("store", [POSTGRES, REDIS, MONGO])
async def test_every_answer_comes_in_time_and_names_what_is_away(
    store: str, mode: Mode, network: Network, world: World
) -> None:
    await network.stores[store].turn(mode)
    told = []
    for path, answer in await all_asked(world):
        assert answer.status < 500 or answer.status == 503, (path, answer)
        if answer.status == 503:
            assert answer["detail"] == detail_of(store, mode), (path, answer)
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


@pytest.mark.hurried
@pytest.mark.parametrize("store", [POSTGRES, REDIS, MONGO])
async def test_every_answer_comes_in_time_where_a_store_is_slow(store: str, network: Network, world: World) -> None:
    await network.stores[store].turn(Mode.SLOW)
    for path, answer in await all_asked(world):
        assert answer.status < 500 or answer["detail"] == detail_of(store, Mode.SLOW), (path, answer)


@pytest.mark.parametrize("mode", [*AWAY, Mode.SLOW], ids=lambda mode: mode.name.lower())
@pytest.mark.hurried
@pytest.mark.parametrize("store", [POSTGRES, REDIS, MONGO])
async def test_nobody_is_let_in_by_a_failure(store: str, mode: Mode, network: Network, world: World) -> None:
    ended = world.alice.at(world.alice.base)
    await ended.log_in()
    await ended.post("/auth/logout")
    stranger = Actor(world.alice.http, world.alice.base, "Nobody")
    await network.stores[store].turn(mode)
    paths = (f"/projects/{world.project}", f"/workspaces/{world.workspace}", f"/jobs/{world.job}")
    refusals = {world.mallory: (404, 503), ended: (401, 503), stranger: (401,)}
    for who, refused in refusals.items():
        answers = await asyncio.gather(*(world.call(who, "GET", path) for path in paths))
        assert all(answer.status in refused for answer in answers), answers
