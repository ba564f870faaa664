"""What migrations cannot do in SQL: columns that are filled by Python, after ``migrations.apply``.

Each run takes up what is left to do, so it may be interrupted, run twice at once, and run beside servers.
"""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import asyncpg
from asyncpg import Record

from server.auth import addresses
from server.auth import store as accounts
from server.postgres import CONNECT_SECONDS, Executor
from server.projects import invitations_store
from server.settings import StartError

BATCH_ROWS = 500
MAX_LISTED = 100
STATEMENT_SECONDS = 60.0


async def run(database_url: str) -> list[str]:
    """Fill what is empty; return what an operator should know, a line each.

    Raises:
        StartError: PostgreSQL is away.
    """
    async with _connected(database_url) as db:
        await _fill_keys_of_invitations(db)
        return await _fill_keys_of_accounts(db)


async def _fill_keys_of_accounts(db: Executor) -> list[str]:
    """Give each account its ``email_key``, the oldest first; return a line for each whose key another one has."""
    lines: list[str] = []
    count = 0
    after: tuple[Any, Any] = (None, None)
    while batch := await accounts.users_without_key(db, limit=BATCH_ROWS, after=after):
        left = [user for user in batch if not await _give_key(db, user)]
        lines += map(_described, left[: MAX_LISTED - len(lines)])
        count += len(left)
        after = (batch[-1]["created_at"], batch[-1]["id"])
    return lines if count == len(lines) else [*lines, f"without a key: {count - len(lines)} more"]


async def _give_key(db: Executor, user: Record) -> bool:
    try:
        return await accounts.give_key(db, user=user["id"], email_key=addresses.key(user["email"]))
    except asyncpg.UniqueViolationError:  # a registration has just taken it
        return False


async def _fill_keys_of_invitations(db: Executor) -> None:
    while batch := await invitations_store.invitations_without_key(db, limit=BATCH_ROWS):
        for row in batch:
            await invitations_store.give_key(db, invitation=row["id"], email_key=addresses.key(row["email"]))


def _described(user: Record) -> str:
    """In ASCII: twins look the same, and old addresses may hold what a terminal obeys."""
    email, key = user["email"], addresses.key(user["email"])
    return f"without a key: {user['id']} {email!a}: another account has {key!a}"


@asynccontextmanager
async def _connected(database_url: str) -> AsyncIterator[Executor]:
    """Not the pool of ``server.postgres``: its deadline is for requests, and after a migration disks are busy."""
    try:
        connection: Any = await asyncpg.connect(
            database_url, timeout=CONNECT_SECONDS, command_timeout=STATEMENT_SECONDS
        )
        try:
            yield connection
        finally:
            await connection.close(timeout=CONNECT_SECONDS)
    except (OSError, TimeoutError, asyncpg.PostgresError, asyncpg.InterfaceError) as error:
        raise StartError(f"PostgreSQL cannot be used: {' '.join(str(error).split())}") from error
