"""PostgreSQL: one pool, JSON codecs, and a deadline on every statement.

Lock order
    Statements and transactions that lock several rows lock them in this order, so that none waits for another that
    waits for it:

    1. users: the projects of a user cannot change meanwhile
    2. projects, by id
    3. members, invitations, workspaces: several of them only under a project's NO KEY UPDATE, which one holds alone
    4. documents, by id
    5. updates, snapshots and versions of documents; activity

    and, apart from these: users, then sessions by id, then refresh tokens.

    Cascades run downwards, and an insert locks its parents (foreign keys), so a statement that changes rows of a
    project locks the project itself first: in its first CTE, which the others read from. ``FOR NO KEY UPDATE`` if it
    changes what the project shows, because a trigger then raises the project's revision: a weaker lock would have to
    be raised, and two that raise theirs while a deletion waits for both wait for each other. Else ``FOR KEY SHARE``,
    which many hold at once and a deletion waits for.

    A new workspace is nobody else's to lock: there the trigger takes the lock, as late as it can. A commit of live
    edits changes documents only, so it begins with these. Housekeeping takes what is free (``SKIP LOCKED``).

    tests/field/test_deadlocks.py holds every statement and every endpoint to this.

Collisions
    What still collides (a deadlock, a serialization failure) is rolled back by PostgreSQL and runs once more here.
    PostgreSQL notices a deadlock after its ``deadlock_timeout``, 1 s by default; a request may wait 1.6 s for its
    stores, so there is time for one more attempt, and none for a third.
"""

import asyncio
import functools
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any, Protocol, TypeVar

import asyncpg
import orjson
import structlog

from server import json
from server.budget import within
from server.errors import NotFound, Unavailable, store_down, store_slow
from server.together import Send, Together

log = structlog.get_logger()

POOL_SIZE = 20
LANES = 6  # of the pool, for single statements; the rest is for transactions, and for what is asked together
CONNECT_SECONDS = 3.0
GIVE_BACK_SECONDS = 0.2
STATEMENT_SECONDS = 1.5  # every answer within 2 s, also when the server hangs
T = TypeVar("T")
Q = TypeVar("Q")
A = TypeVar("A")
Statement = Callable[[Any], Awaitable[Any]]  # on a connection
Search = tuple[str, tuple[Any, ...]]  # a statement and a key
Revisions = list[asyncpg.Range]  # a set of them, as an int8multirange


class Executor(Protocol):
    """What a store function needs: the pool or a transaction."""

    async def fetch(self, query: str, *args: Any) -> list[asyncpg.Record]: ...
    async def fetchrow(self, query: str, *args: Any) -> asyncpg.Record | None: ...
    async def fetchval(self, query: str, *args: Any) -> Any: ...
    async def execute(self, query: str, *args: Any) -> str: ...


class Database:
    """asyncpg's pool, with a deadline that also holds when the server is stopped or black-holed.

    asyncpg itself waits for the server to confirm a cancelled statement, before it takes the connection back; so
    the connection of a statement that failed is given back in a task of its own, which nobody waits for.
    """

    def __init__(self, pool: "asyncpg.Pool[asyncpg.Record]") -> None:
        self.pool = pool
        self._given_back: set[asyncio.Task[None]] = set()
        self._finder: Together[Search, asyncpg.Record | None] = Together(functools.partial(self._connected, _find))
        self._runner: Together[Statement, Any] = Together(
            functools.partial(self._connected, _execute), round_trips=LANES, together=1
        )

    async def fetch(self, query: str, *args: Any) -> list[asyncpg.Record]:
        return await self._run(lambda connection: connection.fetch(query, *args))

    async def fetchrow(self, query: str, *args: Any) -> asyncpg.Record | None:
        return await self._run(lambda connection: connection.fetchrow(query, *args))

    async def fetchval(self, query: str, *args: Any) -> Any:
        return await self._run(lambda connection: connection.fetchval(query, *args))

    async def execute(self, query: str, *args: Any) -> str:
        return await self._run(lambda connection: connection.execute(query, *args))

    async def find(self, query: str, *key: Any) -> asyncpg.Record | None:
        """The row of one key, asked together with other requests' keys; None where there is none.

        The statement takes an array for each part of the key (``unnest($1::uuid[]) WITH ORDINALITY``), and each of
        its rows says by ``asked`` which key it belongs to, the first is 1. It looks each key up in an index, by
        ``LATERAL (... LIMIT 1)``: for a join PostgreSQL would read a small table whole, and keep to that plan while
        the table grows, until it is analysed. It is for reads that every request makes.
        """
        with translate_errors():
            return await self._finder.ask((query, key), seconds=within(STATEMENT_SECONDS))

    async def transact(self, work: Callable[[Executor], Awaitable[T]]) -> T:
        """Return what ``work`` returns, run in one transaction: all of its statements take effect, or none.

        It has the time of one statement. If it collides with other writes it runs once more from its beginning, so
        it has no effects but those on the database.

        Raises:
            Unavailable: PostgreSQL is down or slow, or it collided twice.
        """

        async def attempt() -> T:
            async with self._transaction() as transaction:
                return await work(transaction)

        return await _retried(attempt)

    async def ping(self) -> None:
        await self.fetchval("SELECT 1")

    async def close(self) -> None:
        await self._finder.close()
        await self._runner.close()
        if self._given_back:
            _, late = await asyncio.wait(self._given_back, timeout=GIVE_BACK_SECONDS)
            for task in late:  # of a server that does not confirm it
                task.cancel()
        try:
            async with asyncio.timeout(CONNECT_SECONDS):
                await self.pool.close()
        except TimeoutError:
            self.pool.terminate()

    async def _run(self, statement: Callable[[Any], Awaitable[T]]) -> T:
        async def attempt() -> T:
            answer: T = await self._runner.ask(statement, seconds=within(STATEMENT_SECONDS))
            return answer

        return await _retried(attempt)

    @asynccontextmanager
    async def _transaction(self) -> AsyncIterator[Executor]:
        """At its deadline the connection is terminated, which ends the transaction."""
        loop = asyncio.get_running_loop()
        deadline = loop.time() + within(STATEMENT_SECONDS)
        connection: Any = await self.pool.acquire(timeout=deadline - loop.time())
        timer = loop.call_at(deadline, connection.terminate)
        try:
            async with connection.transaction():
                yield connection
        except _LOST as error:
            if loop.time() >= deadline:
                raise TimeoutError("No answer in time") from error
            raise
        finally:
            timer.cancel()
            self._give_back(connection)

    @asynccontextmanager
    async def _connected(self, send: Callable[[Any, list[Q]], Awaitable[list[A]]]) -> AsyncIterator[Send[Q, A]]:
        """A connection for as long as others wait for it: to give it back and take another costs as much as to ask."""
        async with asyncio.timeout(STATEMENT_SECONDS):
            connection = await self.pool.acquire()
        try:
            yield functools.partial(send, connection)
        finally:
            self._give_back(connection)

    def _give_back(self, connection: Any) -> None:
        task = asyncio.ensure_future(self.pool.release(connection))
        self._given_back.add(task)
        task.add_done_callback(self._forget)

    def _forget(self, task: "asyncio.Task[None]") -> None:
        self._given_back.discard(task)
        if not task.cancelled():
            task.exception()  # seen: the caller was told already


async def _execute(connection: Any, statements: list[Statement]) -> list[Any]:
    async with asyncio.timeout(STATEMENT_SECONDS):
        try:
            return [await statement(connection) for statement in statements]
        except asyncpg.PostgresError as error:
            if connection.is_closed():
                raise
            return [error]


async def _find(connection: Any, searches: list[Search]) -> list[asyncpg.Record | None]:
    found: list[asyncpg.Record | None] = [None] * len(searches)
    places: dict[str, list[int]] = {}
    for place, (query, _) in enumerate(searches):
        places.setdefault(query, []).append(place)
    async with asyncio.timeout(STATEMENT_SECONDS):
        for query, asked in places.items():
            keys = (searches[place][1] for place in asked)
            for row in await connection.fetch(query, *map(list, zip(*keys, strict=True))):
                found[asked[row["asked"] - 1]] = row
    return found


async def _retried(attempt: Callable[[], Awaitable[T]]) -> T:
    """Return what ``attempt`` returns, made again if it collided with other writes, once."""
    with translate_errors():
        try:
            return await attempt()
        except _COLLIDED as error:
            log.warning("concurrent writes collided", error=type(error).__name__)
        return await attempt()


class translate_errors:  # noqa: N801 - reads as a statement: with translate_errors():
    """Turn what asyncpg raises into our 503, which says whether PostgreSQL is down, is slow or gave up.

    And, if what a new row belongs to has been deleted since it was looked up, into our 404.
    """

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if error is not None and (answer := _answer(error)) is not None:
            raise answer from error


def _answer(error: BaseException) -> Unavailable | NotFound | None:
    if isinstance(error, _SLOW):
        return store_slow("PostgreSQL")
    if isinstance(error, _DOWN) or _is_closed_transport(error):
        return store_down("PostgreSQL")
    if isinstance(error, _COLLIDED):
        return Unavailable("Concurrent writes collided; try again")
    if isinstance(error, asyncpg.ForeignKeyViolationError):
        return NotFound("It is gone")
    return None


def _is_closed_transport(error: BaseException | None) -> bool:
    """What uvloop says when asyncpg writes to a connection that the server has just dropped."""
    return isinstance(error, RuntimeError) and "closed" in str(error)


_LOST = (
    asyncpg.PostgresConnectionError,
    asyncpg.InterfaceError,
    asyncpg.InternalClientError,  # the connection broke in the middle of a statement
)
_SLOW = (TimeoutError, asyncpg.QueryCanceledError, asyncpg.LockNotAvailableError)
_DOWN = (
    *_LOST,
    OSError,
    asyncpg.CannotConnectNowError,
    asyncpg.AdminShutdownError,
    asyncpg.CrashShutdownError,
    asyncpg.InsufficientResourcesError,  # of connections, memory or disk
    asyncpg.ReadOnlySQLTransactionError,
)
_COLLIDED = (asyncpg.DeadlockDetectedError, asyncpg.SerializationError)


async def connect(url: str, *, size: int = POOL_SIZE, least: int = 1) -> Database:
    """The pool, with at least so many live connections.

    Raises:
        OSError, TimeoutError, asyncpg.PostgresError: the server is away or refuses us.
    """
    pool = await asyncpg.create_pool(
        url,
        min_size=least,
        max_size=size,
        timeout=CONNECT_SECONDS,
        command_timeout=STATEMENT_SECONDS,
        init=_prepare,
        reset=_leave_as_it_is,
        server_settings={
            "application_name": "collaborative-workspace",
            "statement_timeout": str(int(STATEMENT_SECONDS * 1000)),
            "idle_in_transaction_session_timeout": "10000",
            "timezone": "UTC",
            # Plans of ours are cached per connection; JIT only adds latency to short statements.
            "jit": "off",
        },
    )
    assert pool is not None
    return Database(pool)


async def _leave_as_it_is(_: Any) -> None:
    """asyncpg would spend a round trip on undoing what nobody here does: SET, LISTEN, advisory locks of a session."""


async def _prepare(connection: Any) -> None:
    await connection.set_type_codec(
        "jsonb",
        schema="pg_catalog",
        encoder=lambda value: json.dumps(value).decode(),
        decoder=orjson.loads,
    )
