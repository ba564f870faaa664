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
    PostgreSQL rolls back a write that conflicts all the same (a deadlock, a serialization failure); it is retried here
    once. PostgreSQL detects a deadlock after its ``deadlock_timeout``, 1 s by default; a request may wait 1.6 s for its
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
from server.batching import Batcher, SendBatch
from server.deadline import remaining
from server.errors import NotFound, Unavailable, store_timed_out, store_unreachable

log = structlog.get_logger()

MAX_POOL_SIZE = 20
RETRY_BACKOFF_SECONDS = 0.05  # mean of the pause, with jitter, before a write that conflicted is retried
MAX_STATEMENT_CONNECTIONS = 6  # for single statements; the others are for transactions and batched lookups
CONNECT_TIMEOUT_SECONDS = 3.0
RELEASE_TIMEOUT_SECONDS = 0.2
STATEMENT_TIMEOUT_SECONDS = 1.5  # for responses within 2 s, also when PostgreSQL hangs
T = TypeVar("T")
RequestT = TypeVar("RequestT")
ResultT = TypeVar("ResultT")
Statement = Callable[[Any], Awaitable[Any]]  # takes a connection
Lookup = tuple[str, tuple[Any, ...]]  # a statement and a key
Revisions = list[asyncpg.Range]  # a set of revisions, as an int8multirange


class Executor(Protocol):
    """The pool or a transaction: the handle that store functions take."""

    async def fetch(self, query: str, *args: Any) -> list[asyncpg.Record]: ...
    async def fetchrow(self, query: str, *args: Any) -> asyncpg.Record | None: ...
    async def fetchval(self, query: str, *args: Any) -> Any: ...
    async def execute(self, query: str, *args: Any) -> str: ...


class Database:
    """asyncpg's pool, with timeouts that also hold while PostgreSQL is stopped or its packets are lost.

    asyncpg itself waits until the server confirms a cancelled statement before it releases the connection; so a
    background task releases connections, and no request waits for it.
    """

    def __init__(self, pool: "asyncpg.Pool[asyncpg.Record]") -> None:
        self.pool = pool
        self._releasing: set[asyncio.Task[None]] = set()
        self._lookup_batcher: Batcher[Lookup, asyncpg.Record | None] = Batcher(
            functools.partial(self._acquire, _lookup_batch)
        )
        self._statement_batcher: Batcher[Statement, Any] = Batcher(
            functools.partial(self._acquire, _execute_batch), max_concurrent=MAX_STATEMENT_CONNECTIONS, max_batch=1
        )

    async def fetch(self, query: str, *args: Any) -> list[asyncpg.Record]:
        return await self._run(lambda connection: connection.fetch(query, *args))

    async def fetchrow(self, query: str, *args: Any) -> asyncpg.Record | None:
        return await self._run(lambda connection: connection.fetchrow(query, *args))

    async def fetchval(self, query: str, *args: Any) -> Any:
        return await self._run(lambda connection: connection.fetchval(query, *args))

    async def execute(self, query: str, *args: Any) -> str:
        return await self._run(lambda connection: connection.execute(query, *args))

    async def fetchrow_batched(self, query: str, *key: Any) -> asyncpg.Record | None:
        """Return the row of one key, or None; lookups of many requests share a batch. For reads of every request.

        The statement takes an array for each part of the key (``unnest($1::uuid[]) WITH ORDINALITY``), and the column
        ``asked`` of its rows is the number of the key, from 1. It looks each key up in an index, by
        ``LATERAL (... LIMIT 1)``: for a join PostgreSQL would scan a small table, and keep that plan while the table
        grows, until it is analysed.
        """
        with translate_errors():
            return await self._lookup_batcher.submit((query, key), timeout=remaining(STATEMENT_TIMEOUT_SECONDS))

    async def transact(self, work: Callable[[Executor], Awaitable[T]]) -> T:
        """Run ``work`` in one transaction and return its result: all of its statements take effect, or none.

        The transaction has the timeout of one statement. If it conflicts with other writes, it is retried once from
        its beginning, so ``work`` must not have effects outside the database.

        Raises:
            Unavailable: PostgreSQL is down or slow, or both attempts conflicted with other writes.
        """

        async def attempt() -> T:
            async with self._transaction() as transaction:
                return await work(transaction)

        return await _retry_once_on_conflict(attempt)

    async def ping(self) -> None:
        await self.fetchval("SELECT 1")

    async def close(self) -> None:
        await self._lookup_batcher.close()
        await self._statement_batcher.close()
        if self._releasing:
            _, late = await asyncio.wait(self._releasing, timeout=RELEASE_TIMEOUT_SECONDS)
            for task in late:  # the server does not confirm the cancellation
                task.cancel()
        try:
            async with asyncio.timeout(CONNECT_TIMEOUT_SECONDS):
                await self.pool.close()
        except TimeoutError:
            self.pool.terminate()

    async def _run(self, statement: Callable[[Any], Awaitable[T]]) -> T:
        async def attempt() -> T:
            result: T = await self._statement_batcher.submit(statement, timeout=remaining(STATEMENT_TIMEOUT_SECONDS))
            return result

        return await _retry_once_on_conflict(attempt)

    @asynccontextmanager
    async def _transaction(self) -> AsyncIterator[Executor]:
        """Open a transaction; at its deadline the connection is terminated, which ends the transaction."""
        loop = asyncio.get_running_loop()
        deadline = loop.time() + remaining(STATEMENT_TIMEOUT_SECONDS)
        connection: Any = await self.pool.acquire(timeout=deadline - loop.time())
        timer = loop.call_at(deadline, connection.terminate)
        try:
            async with connection.transaction():
                yield connection
        except _CONNECTION_ERRORS as error:
            if loop.time() >= deadline:
                raise TimeoutError("No answer in time") from error
            raise
        finally:
            timer.cancel()
            self._release(connection)

    @asynccontextmanager
    async def _acquire(
        self, send: Callable[[Any, list[RequestT]], Awaitable[list[ResultT]]]
    ) -> AsyncIterator[SendBatch[RequestT, ResultT]]:
        """Acquire a connection for successive batches: releasing and acquiring one costs as much as a lookup."""
        async with asyncio.timeout(STATEMENT_TIMEOUT_SECONDS):
            connection = await self.pool.acquire()
        try:
            yield functools.partial(send, connection)
        finally:
            self._release(connection)

    def _release(self, connection: Any) -> None:
        task = asyncio.ensure_future(self.pool.release(connection))
        self._releasing.add(task)
        task.add_done_callback(self._on_released)

    def _on_released(self, task: "asyncio.Task[None]") -> None:
        self._releasing.discard(task)
        if not task.cancelled():
            task.exception()  # mark it as retrieved: the caller has an error already


async def _execute_batch(connection: Any, statements: list[Statement]) -> list[Any]:
    async with asyncio.timeout(STATEMENT_TIMEOUT_SECONDS):
        try:
            return [await statement(connection) for statement in statements]
        except asyncpg.PostgresError as error:
            if connection.is_closed():
                raise
            return [error]


async def _lookup_batch(connection: Any, lookups: list[Lookup]) -> list[asyncpg.Record | None]:
    rows: list[asyncpg.Record | None] = [None] * len(lookups)
    indexes_by_query: dict[str, list[int]] = {}
    for index, (query, _) in enumerate(lookups):
        indexes_by_query.setdefault(query, []).append(index)
    async with asyncio.timeout(STATEMENT_TIMEOUT_SECONDS):
        for query, indexes in indexes_by_query.items():
            keys = (lookups[index][1] for index in indexes)
            for row in await connection.fetch(query, *map(list, zip(*keys, strict=True))):
                rows[indexes[row["asked"] - 1]] = row
    return rows


async def _retry_once_on_conflict(attempt: Callable[[], Awaitable[T]]) -> T:
    """Return the result of ``attempt``; retry once if it conflicts with other writes."""
    with translate_errors():
        try:
            return await attempt()
        except _CONFLICT_ERRORS as error:
            log.warning("write conflict, transaction retried", error=type(error).__name__)
        # Without a pause the retry could lock a row before the transaction that won does, and conflict with it again.
        await asyncio.sleep(RETRY_BACKOFF_SECONDS * (0.5 + random.random()))  # noqa: S311 - jitter is no secret
        return await attempt()


class translate_errors:  # noqa: N801 - reads as a statement: with translate_errors():
    """Translate asyncpg's errors to a 503, which says whether PostgreSQL is down, is slow or rolled the write back.

    A violated foreign key becomes a 404: the parent of a new row was deleted after it was looked up.
    """

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if error is not None and (translated := _to_service_error(error)) is not None:
            raise translated from error


def _to_service_error(error: BaseException) -> Unavailable | NotFound | None:
    if isinstance(error, _TIMEOUT_ERRORS):
        return store_timed_out("PostgreSQL")
    if isinstance(error, _UNAVAILABLE_ERRORS) or _is_closed_transport(error):
        return store_unreachable("PostgreSQL")
    if isinstance(error, _CONFLICT_ERRORS):
        return Unavailable("Concurrent writes conflicted; retry the request")
    if isinstance(error, asyncpg.ForeignKeyViolationError):
        return NotFound("Resource not found")
    return None


def _is_closed_transport(error: BaseException | None) -> bool:
    """Recognize uvloop's error for asyncpg's write to a connection that the server has just closed."""
    return isinstance(error, RuntimeError) and "closed" in str(error)


_CONNECTION_ERRORS = (
    asyncpg.PostgresConnectionError,
    asyncpg.InterfaceError,
    asyncpg.InternalClientError,  # the connection broke in the middle of a statement
)
_TIMEOUT_ERRORS = (TimeoutError, asyncpg.QueryCanceledError, asyncpg.LockNotAvailableError)
_UNAVAILABLE_ERRORS = (
    *_CONNECTION_ERRORS,
    OSError,
    asyncpg.CannotConnectNowError,
    asyncpg.AdminShutdownError,
    asyncpg.CrashShutdownError,
    asyncpg.InsufficientResourcesError,  # of connections, memory or disk
    asyncpg.ReadOnlySQLTransactionError,
)
_CONFLICT_ERRORS = (asyncpg.DeadlockDetectedError, asyncpg.SerializationError)


async def connect(url: str, *, max_size: int = MAX_POOL_SIZE, min_size: int = 1) -> Database:
    """Open the pool.

    Raises:
        OSError, TimeoutError, asyncpg.PostgresError: the server is unavailable or rejects the login.
    """
    pool = await asyncpg.create_pool(
        url,
        min_size=min_size,
        max_size=max_size,
        timeout=CONNECT_TIMEOUT_SECONDS,
        command_timeout=STATEMENT_TIMEOUT_SECONDS,
        init=_init_connection,
        reset=_skip_reset,
        server_settings={
            "application_name": "collaborative-workspace",
            "statement_timeout": str(int(STATEMENT_TIMEOUT_SECONDS * 1000)),
            "idle_in_transaction_session_timeout": "10000",
            "timezone": "UTC",
            # Plans are cached per connection; JIT only adds latency to short statements.
            "jit": "off",
        },
    )
    assert pool is not None
    return Database(pool)


async def _skip_reset(_: Any) -> None:
    """Skip asyncpg's reset, a round trip that undoes SET, LISTEN and advisory locks of a session: none are used."""


async def _init_connection(connection: Any) -> None:
    await connection.set_type_codec(
        "jsonb",
        schema="pg_catalog",
        encoder=lambda value: json.dumps(value).decode(),
        decoder=orjson.loads,
    )
