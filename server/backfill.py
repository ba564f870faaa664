"""Backfill of columns whose values only Python can compute; runs after ``migrations.apply``.

Each run continues with the rows that are left, so it may be interrupted, run twice at once, and run beside servers.
"""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import asyncpg
from asyncpg import Record

from server.auth import email_addresses
from server.auth import store as accounts
from server.postgres import CONNECT_TIMEOUT_SECONDS, Executor
from server.projects import invitations_store
from server.settings import StartError

MAX_BATCH_ROWS = 500
MAX_REPORTED_ACCOUNTS = 100
BACKFILL_STATEMENT_TIMEOUT_SECONDS = 60.0


async def run(database_url: str) -> list[str]:
    """Fill the empty columns; return lines for the operator, one for each account that cannot have a key.

    Raises:
        StartError: PostgreSQL is unavailable.
    """
    async with _connected(database_url) as db:
        await _fill_invitation_email_keys(db)
        return await _fill_account_email_keys(db)


async def _fill_account_email_keys(db: Executor) -> list[str]:
    """Set the ``email_key`` of each account, oldest first; return a line for each whose key another account has."""
    lines: list[str] = []
    count = 0
    after: tuple[Any, Any] = (None, None)
    while batch := await accounts.users_without_email_key(db, limit=MAX_BATCH_ROWS, after=after):
        skipped = [user for user in batch if not await _set_email_key(db, user)]
        lines += map(_described, skipped[: MAX_REPORTED_ACCOUNTS - len(lines)])
        count += len(skipped)
        after = (batch[-1]["created_at"], batch[-1]["id"])
    return lines if count == len(lines) else [*lines, f"without a key: {count - len(lines)} more"]


async def _set_email_key(db: Executor, user: Record) -> bool:
    try:
        return await accounts.set_email_key(db, user=user["id"], email_key=email_addresses.key(user["email"]))
    except asyncpg.UniqueViolationError:  # a concurrent registration took the key
        return False


async def _fill_invitation_email_keys(db: Executor) -> None:
    while batch := await invitations_store.invitations_without_email_key(db, limit=MAX_BATCH_ROWS):
        for row in batch:
            await invitations_store.set_email_key(db, invitation=row["id"], email_key=email_addresses.key(row["email"]))


def _described(user: Record) -> str:
    """Describe an account without a key, in ASCII: homographs look alike, and old addresses may hold escape codes."""
    email, key = user["email"], email_addresses.key(user["email"])
    return f"without a key: {user['id']} {email!a}: another account has {key!a}"


@asynccontextmanager
async def _connected(database_url: str) -> AsyncIterator[Executor]:
    """Open one connection with a long statement timeout.

    The pool of ``server.postgres`` has the timeout of requests, and after a migration disks are busy.
    """
    try:
        connection: Any = await asyncpg.connect(
            database_url, timeout=CONNECT_TIMEOUT_SECONDS, command_timeout=BACKFILL_STATEMENT_TIMEOUT_SECONDS
        )
        try:
            yield connection
        finally:
            await connection.close(timeout=CONNECT_TIMEOUT_SECONDS)
    except (OSError, TimeoutError, asyncpg.PostgresError, asyncpg.InterfaceError) as error:
        raise StartError(f"PostgreSQL cannot be used: {' '.join(str(error).split())}") from error
