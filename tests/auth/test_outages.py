"""Stores that are down, emptied, restarted or silent: nobody waits long, and no ended session comes back.

Every test has stores of its own. ``aged`` makes Redis one that has remembered for long, whose word counts.
"""

import asyncio
import os
import signal
import time
from collections.abc import AsyncIterator, Awaitable
from urllib.parse import urlsplit

import asyncpg
import pytest
from redis.asyncio import Redis

from server.auth import blacklist
from server.devstack.stack import Stack
from tests.actors import PASSWORD, Actor, Answer
from tests.conftest import MakeActor, MakeServer

SINCE = "{auth}:remembers-since"
LONGEST_SECONDS = 2.0


@pytest.fixture
async def base(make_server: MakeServer, own_stack: Stack) -> str:
    return await make_server(**places(own_stack))


@pytest.fixture
async def other_base(make_server: MakeServer, own_stack: Stack) -> str:
    return await make_server(**places(own_stack))


def places(stack: Stack, **other: str) -> dict[str, str]:
    names = {"database_url": "DATABASE_URL", "redis_url": "REDIS_URL", "mongodb_uri": "MONGODB_URI"}
    return {field: stack.urls[name] for field, name in names.items()} | other


@pytest.fixture
async def redis(own_stack: Stack) -> AsyncIterator[Redis]:
    async with Redis.from_url(own_stack.valkey.url) as client:
        yield client


async def in_time(call: Awaitable[Answer]) -> Answer:
    began = time.monotonic()
    answer = await call
    assert time.monotonic() - began < LONGEST_SECONDS, answer
    return answer


async def status(actor: Actor, path: str = "/auth/sessions") -> int:
    return (await in_time(actor.get(path))).status


async def aged(redis: Redis, *, since: float = 3600) -> None:
    """Redis remembers since an hour ago (asked once before, so that it has met our script)."""
    await redis.set(SINCE, int(time.time() - since))


async def alice_and_her_phone(make_actor: MakeActor, base: str) -> tuple[Actor, Actor]:
    alice = await make_actor("Alice", base)
    return alice, await alice.at(base).log_in()


async def test_redis_that_has_remembered_for_long_answers_alone(
    base: str, make_actor: MakeActor, redis: Redis, own_stack: Stack
) -> None:
    """The quick answer is used: a row that ended behind its back is not looked at."""
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


async def test_redis_killed_the_rows_decide(base: str, make_actor: MakeActor, redis: Redis, own_stack: Stack) -> None:
    alice, phone = await alice_and_her_phone(make_actor, base)
    assert await status(alice) == 200
    await aged(redis)
    assert await status(alice) == 200
    own_stack.valkey.kill()
    assert (await in_time(phone.post("/auth/logout"))).status == 204
    assert await status(phone) == 401
    assert await status(alice) == 200
    await alice.at(base).log_in()
    ticket = await in_time(alice.post("/auth/ws-ticket"))
    assert (ticket.status, ticket.code) == (503, "unavailable")
    assert int(ticket.headers["Retry-After"]) > 0

    own_stack.valkey.start()
    assert await status(phone) == 401
    assert await status(alice) == 200


async def test_redis_restarted_does_not_reopen_what_ended_meanwhile(
    base: str, other_base: str, make_actor: MakeActor, redis: Redis, own_stack: Stack
) -> None:
    """Its first note survives in the append-only file; the logout while it was down does not."""
    alice, phone = await alice_and_her_phone(make_actor, base)
    elsewhere, phone_elsewhere = alice.at(other_base), phone.at(other_base)
    assert await status(elsewhere) == 200
    await aged(redis)
    assert await status(phone_elsewhere) == 200
    await asyncio.sleep(1.1)  # until it is in the file: appendfsync everysec
    own_stack.valkey.kill()
    assert (await in_time(phone.post("/auth/logout"))).status == 204
    own_stack.valkey.start()
    assert await redis.get(SINCE) is not None  # it claims to remember
    assert [await status(phone_elsewhere) for _ in range(3)] == [401] * 3
    assert await status(elsewhere) == 200


async def test_redis_emptied_does_not_reopen_what_ended(base: str, make_actor: MakeActor, redis: Redis) -> None:
    alice, phone = await alice_and_her_phone(make_actor, base)
    assert await status(alice) == 200
    await aged(redis)
    await phone.post("/auth/logout")
    assert await status(phone) == 401
    await redis.flushall()
    assert await status(phone) == 401
    assert await status(alice) == 200
    assert await status(phone) == 401  # nor with the note that it was emptied


async def test_a_silent_redis_delays_nobody_for_long(base: str, make_actor: MakeActor, own_stack: Stack) -> None:
    alice, phone = await alice_and_her_phone(make_actor, base)
    pid = own_stack.valkey.pid
    assert pid is not None
    os.kill(pid, signal.SIGSTOP)
    try:
        assert (await in_time(phone.post("/auth/logout"))).status == 204
        assert await asyncio.gather(*(status(alice) for _ in range(60))) == [200] * 60
        assert await status(phone) == 401
        assert (await in_time(alice.post("/auth/ws-ticket"))).status == 503
        fresh = await in_time(alice.post("/auth/refresh", {"refreshToken": alice.refresh_token}))
        assert fresh.status == 200
        changed = {"currentPassword": PASSWORD, "newPassword": "Babbage1791"}
        assert (await in_time(alice.post("/auth/password", changed))).status == 204
    finally:
        os.kill(pid, signal.SIGCONT)


async def test_with_neither_store_nobody_is_let_in_and_nobody_waits(
    base: str, make_actor: MakeActor, redis: Redis, own_stack: Stack
) -> None:
    alice, phone = await alice_and_her_phone(make_actor, base)
    assert await status(alice) == 200
    await aged(redis)
    await phone.post("/auth/logout")
    own_stack.postgres.kill()
    ended = await in_time(phone.get("/auth/sessions"))
    assert (ended.status, ended.code) == (401, "unauthenticated")  # Redis can tell, alone
    own_stack.valkey.kill()
    for actor in (alice, phone):
        unknown = await in_time(actor.get("/auth/sessions"))
        assert (unknown.status, unknown.code) == (503, "unavailable")
        assert int(unknown.headers["Retry-After"]) > 0
    login = await in_time(alice.post("/auth/login", {"email": alice.email, "password": PASSWORD}))
    assert (login.status, login.code) == (503, "unavailable")


async def test_a_note_that_one_server_could_not_make_is_not_missed_by_others(
    make_server: MakeServer, other_base: str, make_actor: MakeActor, redis: Redis, own_stack: Stack
) -> None:
    """The wire between one server and Redis is cut while somebody logs out there."""
    async with Wire(own_stack.valkey.url) as wire:
        base = await make_server(**places(own_stack, redis_url=wire.url))
        alice, phone = await alice_and_her_phone(make_actor, base)
        elsewhere = phone.at(other_base)
        assert await status(elsewhere) == 200
        await aged(redis)
        wire.cut()
        assert (await in_time(phone.post("/auth/logout"))).status == 204
        assert await status(elsewhere) == 200  # Redis knows nothing of it yet: this is what must not last
        assert await status(phone) == 401
        await wire.mend()
        async with asyncio.timeout(blacklist.REST_SECONDS + 10):
            while await status(elsewhere) != 401:
                await asyncio.sleep(0.1)
        assert await status(alice.at(other_base)) == 200


class Wire:
    """A connection to a store that can be cut."""

    def __init__(self, url: str) -> None:
        self._target = urlsplit(url)
        self._writers: set[asyncio.StreamWriter] = set()
        self._server: asyncio.Server | None = None
        self._port = 0

    @property
    def url(self) -> str:
        return self._target._replace(netloc=f":{self._target.password}@127.0.0.1:{self._port}").geturl()

    async def __aenter__(self) -> "Wire":
        await self.mend()
        return self

    async def __aexit__(self, *_: object) -> None:
        self.cut()

    async def mend(self) -> None:
        self._server = await asyncio.start_server(self._carry, "127.0.0.1", self._port)
        self._port = self._server.sockets[0].getsockname()[1]

    def cut(self) -> None:
        assert self._server is not None
        self._server.close()
        for writer in self._writers:
            writer.transport.abort()

    async def _carry(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        there, back = await asyncio.open_connection(self._target.hostname, self._target.port)
        self._writers |= {writer, back}
        await asyncio.gather(_pump(reader, back), _pump(there, writer))
        self._writers -= {writer, back}


async def _pump(source: asyncio.StreamReader, sink: asyncio.StreamWriter) -> None:
    try:
        while chunk := await source.read(65536):
            sink.write(chunk)
    except OSError:
        pass
    finally:
        sink.close()
