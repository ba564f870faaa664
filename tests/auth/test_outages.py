"""Stores that are down, emptied, restarted or unresponsive delay no request for long and reopen no ended session.

Every test has its own stores. ``aged`` makes Redis claim that it has kept entries for long, so that it is trusted.
"""

import asyncio
import os
import signal
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass
from uuid import uuid4

import asyncpg
import pytest
from redis.asyncio import Redis

from server.auth import blacklist
from server.devstack.stack import Stack
from server.pipelines import Pipelines
from server.resources import redis_client
from tests.actors import PASSWORD, Actor
from tests.conftest import MakeActor, MakeServer, store_urls_of
from tests.faults import FaultyNetwork, Mode, Proxy
from tests.timeouts import WAIT_TIMEOUT_SECONDS

SINCE = "{auth}:remembers-since"


@pytest.fixture
async def base(make_server: MakeServer, own_stack: Stack) -> str:
    return await make_server(**store_urls_of(own_stack))


@pytest.fixture
async def other_base(make_server: MakeServer, own_stack: Stack) -> str:
    return await make_server(**store_urls_of(own_stack))


@pytest.fixture
async def redis(own_stack: Stack) -> AsyncIterator[Redis]:
    async with Redis.from_url(own_stack.valkey.url) as client:
        yield client


@dataclass
class Wired:
    """A Redis, a proxy in front of it that can be cut, and settings of servers without and with that proxy."""

    redis: Redis
    wire: Proxy
    direct: dict[str, str]
    wired: dict[str, str]


async def status(actor: Actor, path: str = "/auth/sessions") -> int:
    return (await actor.get(path)).status


async def aged(redis: Redis, *, since: float = 3600) -> None:
    """Make Redis claim that it has kept entries for an hour. A request before it must have loaded our script."""
    await redis.set(SINCE, int(time.time() - since))


async def alice_and_her_phone(make_actor: MakeActor, base: str) -> tuple[Actor, Actor]:
    alice = await make_actor("Alice", base)
    return alice, await alice.at(base).log_in()


async def test_complete_blacklist_is_trusted_without_postgresql(
    base: str, make_actor: MakeActor, redis: Redis, own_stack: Stack
) -> None:
    """A session that is ended only in PostgreSQL stays open: the row is not read."""
    alice, phone = await alice_and_her_phone(make_actor, base)
    assert await status(alice) == 200
    await aged(redis)
    await phone.post("/auth/logout")
    assert await status(phone) == 401
    db = await asyncpg.connect(own_stack.postgres.url)
    await db.execute("UPDATE sessions SET ended_at = now()")
    assert await status(alice) == 200
    await redis.delete(SINCE)
    assert await status(alice) == 401
    await db.close()


async def test_postgresql_decides_while_redis_is_down(
    base: str, make_actor: MakeActor, redis: Redis, own_stack: Stack
) -> None:
    alice, phone = await alice_and_her_phone(make_actor, base)
    assert await status(alice) == 200
    await aged(redis)
    assert await status(alice) == 200
    own_stack.valkey.kill()
    assert (await phone.post("/auth/logout")).status == 204
    assert await status(phone) == 401
    assert await status(alice) == 200
    await alice.at(base).log_in()
    ticket = await alice.post("/auth/ws-ticket")
    assert (ticket.status, ticket.code) == (503, "unavailable")
    assert int(ticket.headers["Retry-After"]) > 0

    own_stack.valkey.start()
    assert await status(phone) == 401
    assert await status(alice) == 200


async def test_restarted_redis_does_not_reopen_ended_sessions(
    base: str, other_base: str, make_actor: MakeActor, redis: Redis, own_stack: Stack
) -> None:
    """The key of its age survives in the append-only file; the logout during its outage is not in it."""
    alice, phone = await alice_and_her_phone(make_actor, base)
    elsewhere, phone_elsewhere = alice.at(other_base), phone.at(other_base)
    assert await status(elsewhere) == 200
    await aged(redis)
    assert await status(phone_elsewhere) == 200
    await asyncio.sleep(1.1)  # until the key is in the file: appendfsync everysec
    own_stack.valkey.kill()
    assert (await phone.post("/auth/logout")).status == 204
    own_stack.valkey.start()
    assert await redis.get(SINCE) is not None  # Redis claims to have kept all entries
    assert [await status(phone_elsewhere) for _ in range(3)] == [401] * 3
    assert await status(elsewhere) == 200


async def test_emptied_redis_does_not_reopen_ended_sessions(base: str, make_actor: MakeActor, redis: Redis) -> None:
    alice, phone = await alice_and_her_phone(make_actor, base)
    assert await status(alice) == 200
    await aged(redis)
    await phone.post("/auth/logout")
    assert await status(phone) == 401
    await redis.flushall()
    assert await status(phone) == 401
    assert await status(alice) == 200
    assert await status(phone) == 401  # nor after Redis has a new key of its age


@pytest.mark.real_timeouts("redis_url")
async def test_unresponsive_redis_delays_no_request_for_long(
    base: str, make_actor: MakeActor, own_stack: Stack
) -> None:
    alice, phone = await alice_and_her_phone(make_actor, base)
    pid = own_stack.valkey.pid
    assert pid is not None
    os.kill(pid, signal.SIGSTOP)
    try:
        assert (await phone.post("/auth/logout")).status == 204
        assert await asyncio.gather(*(status(alice) for _ in range(60))) == [200] * 60
        assert await status(phone) == 401
        assert (await alice.post("/auth/ws-ticket")).status == 503
        fresh = await alice.post("/auth/refresh", {"refreshToken": alice.refresh_token})
        assert fresh.status == 200
        passwords = {"currentPassword": PASSWORD, "newPassword": "Babbage1791"}
        assert (await alice.post("/auth/password", passwords)).status == 204
    finally:
        os.kill(pid, signal.SIGCONT)


async def test_outage_of_both_stores_rejects_requests_without_delay(
    base: str, make_actor: MakeActor, redis: Redis, own_stack: Stack
) -> None:
    alice, phone = await alice_and_her_phone(make_actor, base)
    assert await status(alice) == 200
    await aged(redis)
    await phone.post("/auth/logout")
    own_stack.postgres.kill()
    ended = await phone.get("/auth/sessions")
    assert (ended.status, ended.code) == (401, "unauthenticated")  # Redis alone has the entry
    own_stack.valkey.kill()
    for actor in (alice, phone):
        unknown = await actor.get("/auth/sessions")
        assert (unknown.status, unknown.code) == (503, "unavailable")
        assert int(unknown.headers["Retry-After"]) > 0
    login = await alice.post("/auth/login", {"email": alice.email, "password": PASSWORD})
    assert (login.status, login.code) == (503, "unavailable")


@pytest.fixture
async def wired(isolated_stores: dict[str, str]) -> AsyncIterator[Wired]:
    """The shared Redis behind a proxy, for tests that cut the connection and leave Redis itself running."""
    async with (
        FaultyNetwork.start({"redis_url": isolated_stores["redis_url"]}) as network,
        Redis.from_url(isolated_stores["redis_url"]) as redis,
    ):
        await redis.flushdb()
        yield Wired(redis, network.stores["redis_url"], direct=isolated_stores, wired=isolated_stores | network.urls)


async def test_failed_blacklist_write_is_repaired_for_other_servers(
    make_server: MakeServer, make_actor: MakeActor, wired: Wired
) -> None:
    """The connection between one server and Redis is cut while a user logs out there."""
    other_base, base = await make_server(**wired.direct), await make_server(**wired.wired)
    alice, phone = await alice_and_her_phone(make_actor, base)
    elsewhere = phone.at(other_base)
    assert await status(elsewhere) == 200
    await aged(wired.redis)
    await wired.wire.set_mode(Mode.STOPPED)
    assert (await phone.post("/auth/logout")).status == 204
    assert await status(elsewhere) == 200  # Redis has no entry yet: this state must not last
    assert await status(phone) == 401
    await wired.wire.set_mode(Mode.PASS)
    async with asyncio.timeout(WAIT_TIMEOUT_SECONDS):
        while await status(elsewhere) != 401:
            await asyncio.sleep(0.1)
    assert await status(alice.at(other_base)) == 200


async def test_blacklist_entry_lost_with_a_server_is_added_by_the_next_one(
    make_server: MakeServer, make_actor: MakeActor, wired: Wired
) -> None:
    other_base, base = await make_server(**wired.direct), await make_server(**wired.wired)
    _, phone = await alice_and_her_phone(make_actor, base)
    elsewhere = phone.at(other_base)
    assert await status(elsewhere) == 200
    await aged(wired.redis)
    await wired.wire.set_mode(Mode.STOPPED)
    assert (await phone.post("/auth/logout")).status == 204
    assert await status(elsewhere) == 200
    await make_server(**wired.direct)
    async with asyncio.timeout(WAIT_TIMEOUT_SECONDS):
        while await status(elsewhere) != 401:
            await asyncio.sleep(0.05)


@pytest.mark.real_timeouts("redis_url")
async def test_cancelled_blacklist_write_marks_the_blacklist_incomplete(wired: Wired) -> None:
    async with redis_client(wired.wired["redis_url"]) as redis:
        pipelines = Pipelines(redis)
        list_ = blacklist.Blacklist(redis, pipelines, token_ttl=900)

        async def ended() -> bool | None:
            return await list_.is_revoked(session=uuid4(), token_id="x")

        for _ in range(2):  # the first call may have to load our script
            await ended()
        await aged(wired.redis)
        assert await ended() is False
        await wired.wire.set_mode(Mode.BLACK_HOLE)
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.1):
                await list_.add(sessions=[uuid4()])
        assert await ended() is None
        await pipelines.close()
