"""Fixtures for tests of documents."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager
from uuid import UUID

import asyncpg
import pytest

from server import postgres, resources
from server.app import make_channels
from server.documents.rooms import Rooms
from server.postgres import Database
from server.realtime.subscriber import Subscriber
from server.settings import Settings
from tests.actors import Actor
from tests.listeners import NullListener
from tests.timeouts import WAIT_TIMEOUT_SECONDS


@pytest.fixture
async def workspace(alice: Actor, bob: Actor) -> str:
    return await alice.make_workspace(None, bob)


@pytest.fixture
async def db(database_url: str) -> AsyncIterator[Database]:
    made = await postgres.connect(database_url, max_size=5)
    yield made
    await made.close()


class Held:
    """A document whose row another transaction has locked.

    An append to it waits, fails on ``cancelled``, and continues at the end of the lock.
    """

    def __init__(self, connection: asyncpg.Connection, document: UUID) -> None:
        self._connection, self._document = connection, document

    async def waited_for(self) -> None:
        while not await self._waiting():
            await asyncio.sleep(0.005)

    async def cancelled(self) -> None:
        await self.waited_for()
        for process in await self._waiting():
            await self._connection.execute("SELECT pg_cancel_backend($1)", process)

    async def _waiting(self) -> list[int]:
        """Read pg_locks: inside a transaction, pg_stat_activity shows no connection younger than its first read."""
        rows = await self._connection.fetch(
            "SELECT pid FROM pg_locks WHERE NOT granted AND pg_backend_pid() = ANY (pg_blocking_pids(pid))"
        )
        return [row["pid"] for row in rows]

    async def deleted(self) -> None:
        await self._connection.execute("DELETE FROM documents WHERE id = $1", self._document)


Hold = Callable[[str], AbstractAsyncContextManager[Held]]


@pytest.fixture
def hold(database_url: str) -> Hold:
    @contextlib.asynccontextmanager
    async def held(document: str) -> AsyncIterator[Held]:
        connection = await asyncpg.connect(database_url)
        try:
            async with asyncio.timeout(WAIT_TIMEOUT_SECONDS), connection.transaction():
                await connection.execute("SELECT FROM documents WHERE id = $1 FOR UPDATE", UUID(document))
                yield Held(connection, UUID(document))
        finally:
            await connection.close()

    return held


MakeRooms = Callable[[], Rooms]


@pytest.fixture
async def make_rooms(settings: Settings) -> AsyncIterator[MakeRooms]:
    """Live documents as a server process has them, without the REST and socket transports."""
    nobody = NullListener()
    async with resources.connect(settings) as stores:
        subscriber = Subscriber(stores.blocking_redis, channel="test", control=nobody, recheck_all=nobody.resync)
        listening = asyncio.ensure_future(subscriber.listen())
        made: list[Rooms] = []

        def make() -> Rooms:
            made.append(Rooms(stores.db, make_channels(settings, stores), subscriber))
            made[-1].start()
            return made[-1]

        yield make
        for rooms in made:
            await rooms.stop()
        listening.cancel()
        await asyncio.wait({listening})


@pytest.fixture
async def rooms(make_rooms: MakeRooms) -> Rooms:
    return make_rooms()
