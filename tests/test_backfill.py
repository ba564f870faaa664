"""The backfill that ``migrate`` runs after the migrations."""

import asyncio

import asyncpg
import pytest

from server import backfill, migrations
from server.settings import StartError
from tests.auth.test_accounts import wait_until_blocked


@pytest.fixture
def url(empty_database_url: str) -> str:
    migrations.apply(empty_database_url)
    return empty_database_url


async def insert(url: str, *emails: str) -> list[str]:
    """Insert accounts with the same creation time; return their ids, in ascending order."""
    db = await asyncpg.connect(url)
    try:
        ids = [f"00000000-0000-4000-8000-{number:012}" for number in range(len(emails))]
        await db.execute(
            """
            INSERT INTO users (id, email, name, password_hash)
            SELECT id, email, 'Old', 'x' FROM unnest($1::uuid[], $2::text[]) AS old (id, email)
            """,
            ids,
            emails,
        )
        return ids
    finally:
        await db.close()


async def keys(url: str) -> list[str | None]:
    db = await asyncpg.connect(url)
    try:
        return [row["email_key"] for row in await db.fetch("SELECT email_key FROM users ORDER BY id")]
    finally:
        await db.close()


async def test_accounts_get_their_keys_in_batches_oldest_first(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backfill, "MAX_BATCH_ROWS", 2)
    names = ["a", "b", "c", "d", "e"]
    ids = await insert(
        url, *(f"{name}@BÜCHER.example" for name in names), *(f"{name}@bücher.example" for name in names)
    )
    expected = [f"{name}@xn--bcher-kva.example" for name in names]
    for _ in range(2):  # the second run changes nothing
        lines = await backfill.run(url)
        assert await keys(url) == expected + [None] * 5
        assert [line.split()[3] for line in lines] == ids[5:]


async def test_report_lists_a_limited_number_of_accounts_without_a_key(
    url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(backfill, "MAX_BATCH_ROWS", 2)
    monkeypatch.setattr(backfill, "MAX_REPORTED_ACCOUNTS", 3)
    spellings = ["bücher", "bÜcher", "ｂücher", "büｃher", "bücｈer", "bücheｒ"]
    ids = await insert(url, *(f"x@{spelling}.example" for spelling in spellings))
    lines = await backfill.run(url)
    assert [line.split()[3] for line in lines[:3]] == ids[1:4]
    assert lines[3:] == ["without a key: 2 more"]


async def test_account_stays_without_a_key_that_a_concurrent_registration_takes(url: str) -> None:
    (id,) = await insert(url, "x@bücher.example")
    db = await asyncpg.connect(url)
    try:
        async with db.transaction():
            await db.execute(
                "INSERT INTO users (email, name, password_hash) VALUES ('x@xn--bcher-kva.example', 'New', 'x')"
            )
            run = asyncio.ensure_future(backfill.run(url))
            await wait_until_blocked(url)
    finally:
        await db.close()
    (line,) = await run
    assert id in line


async def test_unavailable_database_is_reported_in_one_line(unused_tcp_port: int) -> None:
    with pytest.raises(StartError, match=r"^PostgreSQL cannot be used: .*"):
        await backfill.run(f"postgresql://app@127.0.0.1:{unused_tcp_port}/app")
