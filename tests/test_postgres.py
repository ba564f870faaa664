"""The pool: statements share connections, lookups share statements, and each gets its own result."""

import asyncio
from collections.abc import AsyncIterator

import asyncpg
import pytest

from server import postgres
from server.errors import Unavailable
from server.postgres import MAX_STATEMENT_CONNECTIONS, Database
from tests.timeouts import WAIT_TIMEOUT_SECONDS

DOUBLE = "SELECT asked, key * 2 AS twice FROM unnest($1::int[]) WITH ORDINALITY AS keys (key, asked) WHERE key > 0"
SUM = "SELECT asked, a + b AS sum FROM unnest($1::int[], $2::int[]) WITH ORDINALITY AS keys (a, b, asked)"


@pytest.fixture
async def db(database_url: str) -> AsyncIterator[Database]:
    database = await postgres.connect(database_url)
    yield database
    await database.close()


async def test_each_lookup_of_a_batch_gets_its_own_row(db: Database) -> None:
    doubles = [db.fetchrow_batched(DOUBLE, number) for number in range(300)]
    sums = [db.fetchrow_batched(SUM, number, 1) for number in range(300)]
    rows = await asyncio.gather(*(lookup for pair in zip(doubles, sums, strict=True) for lookup in pair))
    assert [row and row["twice"] for row in rows[::2]] == [None, *range(2, 600, 2)]
    assert [row and row["sum"] for row in rows[1::2]] == list(range(1, 301))


async def test_failed_statement_does_not_affect_others(db: Database) -> None:
    statements = [db.fetchval("SELECT 12 / $1::int", number % 3) for number in range(6 * MAX_STATEMENT_CONNECTIONS)]
    results = await asyncio.gather(*statements, return_exceptions=True)
    for number, result in enumerate(results):
        if number % 3:
            assert result == 12 // (number % 3)
        else:
            assert isinstance(result, asyncpg.DivisionByZeroError)


async def test_hanging_statements_time_out_and_leave_connections_for_transactions(
    db: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(postgres, "STATEMENT_TIMEOUT_SECONDS", 0.5)
    hanging = [asyncio.ensure_future(db.execute("SELECT pg_sleep(600)")) for _ in range(MAX_STATEMENT_CONNECTIONS)]
    await asyncio.sleep(0.1)
    assert await db.transact(lambda transaction: transaction.fetchval("SELECT 1")) == 1
    async with asyncio.timeout(WAIT_TIMEOUT_SECONDS):
        outcomes = await asyncio.gather(*hanging, return_exceptions=True)
    assert all(isinstance(outcome, Unavailable) for outcome in outcomes)
    assert await db.fetchval("SELECT 1") == 1


async def test_a_connection_that_the_server_ends_is_replaced(db: Database) -> None:
    with pytest.raises(Unavailable):
        await db.execute("SELECT pg_terminate_backend(pg_backend_pid())")
    assert await db.fetchval("SELECT 1") == 1
