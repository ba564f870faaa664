"""PostgreSQL: one pool, JSON codecs, and a timeout for every statement.

Lock order
    Statements and transactions that lock several rows lock them in this order, so that they cannot deadlock:

    1. users: the projects of a user cannot change meanwhile
    2. projects, by id
    3. members, invitations, workspaces: several of them only under a project's NO KEY UPDATE lock, which is exclusive
    4. documents, by id
    5. updates, snapshots and versions of documents; activity

    and, apart from these: users, then sessions by id, then refresh tokens.

    Cascades run downwards, and an insert locks its parents (foreign keys), so a statement that changes rows of a
    project locks the project itself first: in its first CTE, which the others read from. The lock is ``FOR NO KEY
    UPDATE`` if the statement changes what a GET of the project returns, because a trigger then raises the project's
    revision: a weaker lock would have to be upgraded, and two transactions that upgrade theirs while a deletion waits
    for both are a deadlock. Else the lock is ``FOR KEY SHARE``, which many hold at once and a deletion waits for.

    No other transaction can lock a new workspace: there the trigger takes the lock, as late as it can. A commit of
    live edits changes documents only, so it begins with these. Housekeeping skips locked rows (``SKIP LOCKED``).

    tests/field/test_deadlocks.py checks every statement and every endpoint against this order.

Conflicts
    PostgreSQL rolls back writes that still conflict (a deadlock, a serialization failure); they are retried here once.
    PostgreSQL detects a deadlock after its ``deadlock_timeout``, 1 s by default; a request may wait 1.6 s for its
    stores, so there is time for one retry, but not for a second.
"""

import asyncio
import functools
import random
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
RETRY_BACKOFF_SECONDS = 0.05  # mean, with jitter, before a write that collided is tried again
LANES = 6  # connections of the pool for single statements; the others are for transactions and batched lookups
CONNECT_SECONDS = 3.0
GIVE_BACK_SECONDS = 0.2
STATEMENT_SECONDS = 1.5  # for responses within 2 s, also when PostgreSQL hangs
T = TypeVar("T")
Q = TypeVar("Q")
A = TypeVar("A")
Statement = Callable[[Any], Awaitable[Any]]  # takes a connection
Search = tuple[str, tuple[Any, ...]]  # a statement and a key
Revisions = list[asyncpg.Range]  # a set of revisions, as an int8multirange


class Executor(Protocol):
    """The pool or a transaction: the handle that store functions take."""

    async def fetch(self, query: str, *args: Any) -> list[asyncpg.Record]: ...
    async def fetchrow(self, query: str, *args: Any) -> asyncpg.Record | None: ...
    async def fetchval(self, query: str, *args: Any) -> Any: ...
    async def execute(self, query: str, *args: Any) -> str: ...


class Database:
    """asyncpg's pool, with timeouts that also hold when the server is stopped or black-holed.

    asyncpg itself waits until the server confirms a cancelled statement before it releases the connection; so a
    background task releases connections, and no request waits for it.
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
        """Return the row of one key, or None; lookups of many requests share a batch. For reads of every request.

        The statement takes an array for each part of the key (``unnest($1::uuid[]) WITH ORDINALITY``), and the column
        ``asked`` of its rows is the number of the key, from 1. It looks each key up in an index, by
        ``LATERAL (... LIMIT 1)``: for a join PostgreSQL would scan a small table, and keep that plan while the table
        grows, until it is analysed.
        """
        with translate_errors():
            return await self._finder.ask((query, key), seconds=within(STATEMENT_SECONDS))

    async def transact(self, work: Callable[[Executor], Awaitable[T]]) -> T:
        """Run ``work`` in one transaction and return its result: all of its statements take effect, or none.

        The transaction has the timeout of one statement. If it conflicts with other writes, it is retried once from
        its beginning, so ``work`` must not have effects outside the database.

        Raises:
            Unavailable: PostgreSQL is down or slow, or both attempts met a conflict.
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
            for task in late:  # the server does not confirm the cancellation
                task.cancel()
        try:
            async with asyncio.timeout(CONNECT_SECONDS):
                await self.pool.close()
        except TimeoutError:
            self.pool.terminate()

    async def _run(self, statement: Callable[[Any], Awaitable[T]]) -> T:
        async def attempt() -> T:
            result: T = await self._runner.ask(statement, seconds=within(STATEMENT_SECONDS))
            return result

        return await _retried(attempt)

    @asynccontextmanager
    async def _transaction(self) -> AsyncIterator[Executor]:
        """Open a transaction; at its deadline the connection is terminated, which ends the transaction."""
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
        """Acquire a connection for successive batches: releasing and acquiring one costs as much as a lookup."""
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
            task.exception()  # mark it as retrieved: the caller has an error already


async def _execute(connection: Any, statements: list[Statement]) -> list[Any]:
    async with asyncio.timeout(STATEMENT_SECONDS):
        try:
            return [await statement(connection) for statement in statements]
        except asyncpg.PostgresError as error:
            if connection.is_closed():
                raise
            return [error]


async def _find(connection: Any, searches: list[Search]) -> list[asyncpg.Record | None]:
    rows: list[asyncpg.Record | None] = [None] * len(searches)
    indexes_by_query: dict[str, list[int]] = {}
    for index, (query, _) in enumerate(searches):
        indexes_by_query.setdefault(query, []).append(index)
    async with asyncio.timeout(STATEMENT_SECONDS):
        for query, indexes in indexes_by_query.items():
            keys = (searches[index][1] for index in indexes)
            for row in await connection.fetch(query, *map(list, zip(*keys, strict=True))):
                rows[indexes[row["asked"] - 1]] = row
    return rows


async def _retried(attempt: Callable[[], Awaitable[T]]) -> T:
    """Return the result of ``attempt``; retry once if it conflicts with other writes."""
    with translate_errors():
        try:
            return await attempt()
        except _COLLIDED as error:
            log.warning("concurrent writes collided", error=type(error).__name__)
        # At once it could take a lock before the transaction that it let through, and meet it a second time.
        await asyncio.sleep(RETRY_BACKOFF_SECONDS * (0.5 + random.random()))  # noqa: S311 - jitter is no secret
        return await attempt()


class translate_errors:  # noqa: N801 - reads as a statement: with translate_errors():
    """Translate asyncpg's errors to a 503, which says whether PostgreSQL is down, is slow or rolled the write back.

    A violated foreign key becomes a 404: the parent of a new row was deleted after it was looked up.
    """

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if error is not None and (translated := _answer(error)) is not None:
            raise translated from error


def _answer(error: BaseException) -> Unavailable | NotFound | None:
    if isinstance(error, _SLOW):
        return store_slow("PostgreSQL")
    if isinstance(error, _DOWN) or _is_closed_transport(error):
        return store_down("PostgreSQL")
    if isinstance(error, _COLLIDED):
        return Unavailable("Concurrent writes conflicted; retry the request")
    if isinstance(error, asyncpg.ForeignKeyViolationError):
        return NotFound("Resource not found")
    return None


def _is_closed_transport(error: BaseException | None) -> bool:
    """Recognize uvloop's error for asyncpg's write to a connection that the server has just closed."""
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
    """Open the pool.

    Raises:
        OSError, TimeoutError, asyncpg.PostgresError: the server is unavailable or rejects the login.
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
            # Plans are cached per connection; JIT only adds latency to short statements.
            "jit": "off",
        },
    )
    assert pool is not None
    return Database(pool)


async def _leave_as_it_is(_: Any) -> None:
    """Skip asyncpg's reset, a round trip that undoes SET, LISTEN and advisory locks of a session: none are used."""


async def _prepare(connection: Any) -> None:
    await connection.set_type_codec(
        "jsonb",
        schema="pg_catalog",
        encoder=lambda value: json.dumps(value).decode(),
        decoder=orjson.loads,
    )
