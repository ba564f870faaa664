"""SQL statements of idempotency keys."""

from datetime import timedelta
from uuid import UUID

from asyncpg import Record

from server.postgres import Executor


async def claim(db: Executor, *, user: UUID, route: str, key: str, body_hash: bytes) -> bool:
    """Claim a key in the transaction of its effect; return whether the key was free.

    Waits for the end of another transaction that has claimed the key.
    """
    return bool(
        await db.fetchval(
            """
            INSERT INTO idempotency_keys (user_id, route, key, body_hash) VALUES ($1, $2, $3, $4)
            ON CONFLICT DO NOTHING RETURNING true
            """,
            user,
            route,
            key,
            body_hash,
        )
    )


async def save_response(
    db: Executor, *, user: UUID, route: str, key: str, status: int, headers: dict[str, str], body: bytes | None
) -> None:
    await db.execute(
        """
        UPDATE idempotency_keys SET status = $4, headers = $5, body = $6
        WHERE user_id = $1 AND route = $2 AND key = $3
        """,
        user,
        route,
        key,
        status,
        headers,
        body,
    )


async def read_response(db: Executor, *, user: UUID, route: str, key: str) -> Record | None:
    return await db.fetchrow(
        """
        SELECT body_hash, status, headers, body FROM idempotency_keys
        WHERE user_id = $1 AND route = $2 AND key = $3
        """,
        user,
        route,
        key,
    )


async def delete_expired_keys(db: Executor, *, older_than: timedelta, limit: int) -> int:
    """Delete a batch of keys that are older than ``older_than``; return how many."""
    deleted: int = await db.fetchval(
        """
        WITH forgotten AS (
            DELETE FROM idempotency_keys WHERE (user_id, route, key) IN (
                SELECT user_id, route, key FROM idempotency_keys WHERE created_at < now() - $1::interval
                ORDER BY created_at LIMIT $2 FOR UPDATE SKIP LOCKED
            ) RETURNING 1
        )
        SELECT count(*) FROM forgotten
        """,
        older_than,
        limit,
    )
    return deleted
