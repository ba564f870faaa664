"""SQL statements of accounts, sessions and refresh tokens."""

from datetime import datetime
from typing import Any
from uuid import UUID

from asyncpg import Record

from server.postgres import Database, Executor, Revisions
from server.settings import Network

MAX_SESSIONS_PER_USER = 50  # active ones; beyond it the least recently used one ends
MAX_KNOWN_NETWORKS = 100  # of one user; beyond it the one with the oldest sign-in is deleted
KNOWN_NETWORK_RETENTION_DAYS = 30  # since the last sign-in


async def create_user(db: Executor, *, email: str, email_key: str, name: str, password_hash: str) -> Record | None:
    """Return the new user, or None if the address is taken: by its key, or exactly so by an account without a key."""
    return await db.fetchrow(
        """
        INSERT INTO users (email, email_key, name, password_hash) VALUES ($1, $2, $3, $4)
        ON CONFLICT DO NOTHING
        RETURNING id, email, name, avatar_url, revision, created_at, updated_at
        """,
        email,
        email_key,
        name,
        password_hash,
    )


async def user_by_email(db: Executor, *, email: str, email_key: str, network: Network | None) -> Record | None:
    """Return the user with this key. An account without a key and with this exact address comes first.

    ``is_known_network`` says whether they have signed in from that network lately.
    """
    return await db.fetchrow(
        """
        SELECT id, email, name, avatar_url, revision, created_at, updated_at, password_hash, EXISTS (
            SELECT FROM known_networks
            WHERE user_id = users.id AND network = $3::cidr AND last_sign_in_at > now() - make_interval(days => $4)
        ) AS is_known_network
        FROM users WHERE email_key = $2 OR (email_key IS NULL AND email = $1)
        ORDER BY email_key NULLS FIRST LIMIT 1
        """,
        email,
        email_key,
        network,
        KNOWN_NETWORK_RETENTION_DAYS,
    )


async def user_by_id(db: Database, *, user: UUID) -> Record | None:
    return await db.fetchrow_batched(
        """
        SELECT asked, found.* FROM unnest($1::uuid[]) WITH ORDINALITY AS keys (key, asked), LATERAL (
            SELECT id, email, name, avatar_url, revision, created_at, updated_at, password_hash
            FROM users WHERE id = key LIMIT 1
        ) AS found
        """,
        user,
    )


async def change_user(
    db: Executor,
    *,
    user: UUID,
    name: str | None,
    avatar_url: str | None,
    set_avatar: bool,
    revisions: Revisions | None,
) -> Record | None:
    """Change and return the user; None if deleted or its revision is not in ``revisions``."""
    return await db.fetchrow(
        """
        UPDATE users SET name = COALESCE($2, name),
                         avatar_url = CASE WHEN $4::boolean THEN $3 ELSE avatar_url END,
                         revision = revision + 1, updated_at = now()
        WHERE id = $1 AND ($5::int8multirange IS NULL OR revision <@ $5)
        RETURNING id, email, name, avatar_url, revision, created_at, updated_at
        """,
        user,
        name,
        avatar_url,
        set_avatar,
        revisions,
    )


async def replace_password_hash(db: Executor, *, user: UUID, old_hash: str, new_hash: str) -> None:
    """Replace a hash with another one of the same password."""
    await db.execute(
        "UPDATE users SET password_hash = $3 WHERE id = $1 AND password_hash = $2", user, old_hash, new_hash
    )


async def change_password(db: Executor, *, user: UUID, old_hash: str, new_hash: str) -> bool:
    """Change the password hash; return whether the old one was still ``old_hash``, which was verified."""
    return bool(
        await db.fetchval(
            """
            UPDATE users SET password_hash = $3, revision = revision + 1, updated_at = now()
            WHERE id = $1 AND password_hash = $2 RETURNING true
            """,
            user,
            old_hash,
            new_hash,
        )
    )


async def lock_user(db: Executor, *, user: UUID, password_hash: str, revisions: Revisions | None) -> bool:
    """Lock the user until the transaction ends, if password and revision match; return whether they do."""
    return bool(
        await db.fetchval(
            """
            SELECT true FROM users
            WHERE id = $1 AND password_hash = $2 AND ($3::int8multirange IS NULL OR revision <@ $3) FOR UPDATE
            """,
            user,
            password_hash,
            revisions,
        )
    )


async def lock_projects(db: Executor, *, user: UUID) -> None:
    """Lock the user's projects, so that no user can join until the transaction ends; in the common lock order."""
    await db.execute(
        """
        SELECT FROM projects WHERE id IN (SELECT project_id FROM members WHERE user_id = $1)
        ORDER BY id FOR UPDATE
        """,
        user,
    )


async def owned_projects(db: Executor, *, user: UUID) -> list[Record]:
    """Return the projects that the user owns, and how many ``others`` are members of each."""
    return await db.fetch(
        """
        SELECT o.project_id AS id,
               (SELECT count(*) - 1 FROM members m WHERE m.project_id = o.project_id) AS others
        FROM members o WHERE o.user_id = $1 AND o.role = 'OWNER'
        """,
        user,
    )


async def delete_projects(db: Executor, *, projects: list[UUID]) -> None:
    """Delete locked projects; lock the documents of all of them first, in the order of their ids."""
    await db.execute(
        """
        WITH locked AS MATERIALIZED (
            SELECT d.id FROM documents d JOIN workspaces w ON w.id = d.workspace_id
            WHERE w.project_id = ANY ($1::uuid[]) ORDER BY d.id FOR UPDATE OF d
        )
        DELETE FROM projects WHERE id = ANY ($1) AND (SELECT count(*) FROM locked) >= 0
        """,
        projects,
    )


async def delete_user(db: Executor, *, user: UUID) -> None:
    await db.execute("DELETE FROM users WHERE id = $1", user)


async def start_session(
    db: Executor,
    *,
    user: UUID,
    password_hash: str,
    token_hash: bytes,
    user_agent: str,
    ip: str,
    network: Network | None,
    expires_at: datetime,
) -> Record | None:
    """Start a session; return its ``id`` and ``ended``, the ids of sessions beyond the maximum. Store the network.

    Returns None if the password is no longer the one that was verified. The lock on the user's row makes a password
    change wait, so that it ends this session, too. Other sign-ins of that user also wait: two sign-ins that each delete
    a network which the other one renews would deadlock.
    """
    return await db.fetchrow(
        """
        WITH holder AS (
            SELECT id FROM users WHERE id = $1 AND password_hash = $7 FOR NO KEY UPDATE
        ), ended AS (
            UPDATE sessions SET ended_at = now() WHERE id IN (
                SELECT id FROM sessions WHERE id IN (
                    SELECT s.id FROM sessions s JOIN holder ON holder.id = s.user_id WHERE s.ended_at IS NULL
                    ORDER BY s.last_used_at DESC OFFSET $6 - 1
                ) ORDER BY id FOR NO KEY UPDATE
            ) RETURNING id
        ), started AS (
            INSERT INTO sessions (user_id, user_agent, ip, expires_at) SELECT id, $3, $4, $5 FROM holder RETURNING id
        ), token AS (
            INSERT INTO refresh_tokens (hash, session_id, expires_at) SELECT $2, id, $5 FROM started
        ), known AS (
            INSERT INTO known_networks (user_id, network) SELECT id, $8::cidr FROM holder WHERE $8::cidr IS NOT NULL
            ON CONFLICT (user_id, network) DO UPDATE SET last_sign_in_at = now()
        ), forgotten AS (
            DELETE FROM known_networks k USING holder WHERE k.user_id = holder.id AND k.network IN (
                SELECT o.network FROM known_networks o WHERE o.user_id = $1 AND o.network <> $8::cidr
                ORDER BY o.last_sign_in_at DESC OFFSET $9 - 1
            )
        )
        SELECT id, ARRAY(SELECT id FROM ended) AS ended FROM started
        """,
        user,
        token_hash,
        user_agent,
        ip,
        expires_at,
        MAX_SESSIONS_PER_USER,
        password_hash,
        network,
        MAX_KNOWN_NETWORKS,
    )


async def find_active_token(db: Database, *, hash: bytes) -> Record | None:
    """Return ``hash`` and ``session_id`` of a refresh token of an active session, even if it is spent."""
    return await db.fetchrow_batched(
        """
        SELECT asked, found.* FROM unnest($1::bytea[]) WITH ORDINALITY AS keys (key, asked), LATERAL (
            SELECT t.hash, t.session_id FROM refresh_tokens t
            WHERE t.hash = key AND t.expires_at > now() AND EXISTS (
                SELECT FROM sessions s WHERE s.id = t.session_id AND s.ended_at IS NULL AND s.expires_at > now())
            LIMIT 1
        ) AS found
        """,
        hash,
    )


async def rotate_refresh_token(
    db: Executor,
    *,
    hash: bytes,
    successor_hash: bytes,
    salt: bytes,
    key_id: str,
    expires_at: datetime,
    grace_seconds: float,
) -> Record | None:
    """Spend a refresh token and insert its successor, in one statement.

    Of concurrent uses one is the first: its salt and key id are stored with the token, and its successor is the only
    one. The others read them from the row, for ``grace_seconds`` or until the successor is used. Returns None for a
    token that cannot be spent. Expired tokens of the session are deleted as well. Rows are looked up by single keys:
    for a join PostgreSQL would scan small tables, and keep that plan while they grow.
    """
    return await db.fetchrow(
        """
        WITH session AS MATERIALIZED (
            SELECT * FROM sessions WHERE id = (SELECT session_id FROM refresh_tokens WHERE hash = $1) FOR NO KEY UPDATE
        ), spent AS (
            UPDATE refresh_tokens t
            SET spent_at = COALESCE(t.spent_at, now()), salt = COALESCE(t.salt, $3), key_id = COALESCE(t.key_id, $4)
            FROM session s
            WHERE t.hash = $1 AND t.expires_at > now()
              AND s.id = t.session_id AND s.ended_at IS NULL AND s.expires_at > now()
              AND (t.spent_at IS NULL
                   OR (t.salt IS NOT NULL AND t.spent_at > now() - make_interval(secs => $6)))
            RETURNING t.hash, t.parent, t.session_id, s.user_id, t.salt, t.key_id
        ), first AS (
            SELECT * FROM spent WHERE salt = $3
        ), issued AS (
            INSERT INTO refresh_tokens (hash, session_id, parent, expires_at)
            SELECT $2, session_id, hash, $5 FROM first
        ), erased AS (
            UPDATE refresh_tokens SET salt = NULL, key_id = NULL
            WHERE hash = (SELECT parent FROM first) AND salt IS NOT NULL
        ), used AS (
            UPDATE sessions SET last_used_at = now(), expires_at = GREATEST(expires_at, $5)
            WHERE id = (SELECT session_id FROM first)
        ), forgotten AS (
            DELETE FROM refresh_tokens WHERE session_id = (SELECT session_id FROM first) AND expires_at < now()
        )
        SELECT session_id, user_id, salt, key_id FROM spent
        """,
        hash,
        successor_hash,
        salt,
        key_id,
        expires_at,
        grace_seconds,
    )


async def end_session_of_reused_token(db: Executor, *, hashes: list[bytes], grace_seconds: float) -> UUID | None:
    """End the session of a spent refresh token that is used again; return its id, or None for any other token.

    A token does not count as reused if it was spent less than ``grace_seconds`` ago and its successor is unused: an
    older version spent it, and two legitimate requests raced.
    """
    ended: UUID | None = await db.fetchval(
        """
        WITH reused AS (
            SELECT session_id FROM refresh_tokens t WHERE hash = ANY ($1::bytea[]) AND (
                spent_at <= now() - make_interval(secs => $2) OR EXISTS (
                    SELECT FROM refresh_tokens c WHERE c.parent = t.hash AND c.spent_at IS NOT NULL))
        ), ended AS (
            UPDATE sessions SET ended_at = now() FROM reused WHERE id = reused.session_id AND ended_at IS NULL
        )
        SELECT session_id FROM reused
        """,
        hashes,
        grace_seconds,
    )
    return ended


async def erase_salts(db: Executor, *, grace_seconds: float) -> int:
    """Erase salts of tokens that were spent more than ``grace_seconds`` ago; return how many, 0 at the end."""
    erased: int = await db.fetchval(
        """
        WITH late AS (
            SELECT hash FROM refresh_tokens
            WHERE salt IS NOT NULL AND spent_at <= now() - make_interval(secs => $1)
            ORDER BY spent_at LIMIT 1000 FOR UPDATE SKIP LOCKED
        ), erased AS (
            UPDATE refresh_tokens t SET salt = NULL, key_id = NULL FROM late WHERE t.hash = late.hash RETURNING t.hash
        )
        SELECT count(*) FROM erased
        """,
        grace_seconds,
    )
    return erased


async def delete_stale_networks(db: Executor) -> int:
    """Delete a batch of networks that no longer count as known; return how many, 0 at the end."""
    deleted: int = await db.fetchval(
        """
        WITH old AS (
            SELECT user_id, network FROM known_networks WHERE last_sign_in_at < now() - make_interval(days => $1)
            ORDER BY last_sign_in_at LIMIT 1000 FOR UPDATE SKIP LOCKED
        ), forgotten AS (
            DELETE FROM known_networks k USING old WHERE k.user_id = old.user_id AND k.network = old.network
            RETURNING k.network
        )
        SELECT count(*) FROM forgotten
        """,
        KNOWN_NETWORK_RETENTION_DAYS,
    )
    return deleted


async def end_session_of_token(db: Executor, *, hashes: list[bytes], user: UUID) -> UUID | None:
    """End the active session of a refresh token of the user; return its id, or None if there is none."""
    ended: UUID | None = await db.fetchval(
        """
        UPDATE sessions s SET ended_at = now() FROM refresh_tokens t
        WHERE t.hash = ANY ($1::bytea[]) AND s.id = t.session_id AND s.user_id = $2 AND s.ended_at IS NULL
        RETURNING s.id
        """,
        hashes,
        user,
    )
    return ended


async def user_name_of_session(db: Database, *, session: UUID, user: UUID) -> str | None:
    """Return the user's name, or None if the session has ended."""
    row = await db.fetchrow_batched(
        """
        SELECT asked, found.name FROM unnest($1::uuid[], $2::uuid[]) WITH ORDINALITY AS keys (session, owner, asked),
        LATERAL (
            SELECT (SELECT name FROM users WHERE id = owner) AS name FROM sessions s
            WHERE s.id = session AND s.user_id = owner AND s.ended_at IS NULL AND s.expires_at > now() LIMIT 1
        ) AS found
        """,
        session,
        user,
    )
    return None if row is None else row["name"]


async def end_session(db: Executor, *, user: UUID, session: UUID) -> bool:
    """End a session of the user; return whether it was active."""
    return bool(
        await db.fetchval(
            """
            UPDATE sessions SET ended_at = now()
            WHERE id = $2 AND user_id = $1 AND ended_at IS NULL AND expires_at > now() RETURNING true
            """,
            user,
            session,
        )
    )


async def end_sessions(db: Executor, *, user: UUID, keep: UUID | None) -> list[UUID]:
    """End every active session of the user but ``keep``; return their ids."""
    rows = await db.fetch(
        """
        UPDATE sessions SET ended_at = now() WHERE id IN (
            SELECT id FROM sessions WHERE user_id = $1 AND ended_at IS NULL AND ($2::uuid IS NULL OR id <> $2)
            ORDER BY id FOR NO KEY UPDATE
        ) RETURNING id
        """,
        user,
        keep,
    )
    return [row["id"] for row in rows]


async def list_sessions(db: Executor, *, user: UUID, current: UUID, limit: int, after: tuple[Any, Any]) -> list[Record]:
    """Return active sessions, newest first; one more than ``limit``."""
    return await db.fetch(
        """
        SELECT id, created_at, last_used_at, expires_at, user_agent, ip, id = $2 AS current
        FROM sessions
        WHERE user_id = $1 AND ended_at IS NULL AND expires_at > now()
          AND ($4::timestamptz IS NULL OR (created_at, id) < ($4, $5::uuid))
        ORDER BY created_at DESC, id DESC LIMIT $3 + 1
        """,
        user,
        current,
        limit,
        *after,
    )


async def recently_ended_sessions(db: Executor, *, seconds: int, limit: int) -> list[UUID]:
    """Return sessions that ended in the last ``seconds``, at most ``limit``."""
    rows = await db.fetch(
        "SELECT id FROM sessions WHERE ended_at > now() - make_interval(secs => $1) LIMIT $2", seconds, limit
    )
    return [row["id"] for row in rows]


async def delete_expired_sessions(db: Executor, *, retention_days: int) -> int:
    """Delete a batch of sessions and tokens that expired long ago; return how many rows, 0 at the end.

    A session may have thousands of tokens: these are deleted first, and the session with the last of them.
    """
    deleted: int = await db.fetchval(
        """
        WITH old AS (
            SELECT id FROM sessions WHERE expires_at < now() - make_interval(days => $1) ORDER BY expires_at LIMIT 100
            FOR UPDATE SKIP LOCKED
        ), tokens AS (
            DELETE FROM refresh_tokens WHERE hash IN (
                SELECT hash FROM refresh_tokens WHERE session_id IN (SELECT id FROM old) LIMIT 1000
            ) RETURNING hash
        ), forgotten AS (
            DELETE FROM sessions s USING old WHERE s.id = old.id
              AND NOT EXISTS (SELECT FROM refresh_tokens t WHERE t.session_id = s.id) RETURNING s.id
        )
        SELECT (SELECT count(*) FROM tokens) + (SELECT count(*) FROM forgotten)
        """,
        retention_days,
    )
    return deleted


async def users_without_email_key(db: Executor, *, limit: int, after: tuple[Any, Any]) -> list[Record]:
    """Return accounts without an ``email_key``, oldest first."""
    return await db.fetch(
        """
        SELECT id, email, created_at FROM users
        WHERE email_key IS NULL AND ($2::timestamptz IS NULL OR (created_at, id) > ($2, $3::uuid))
        ORDER BY created_at, id LIMIT $1
        """,
        limit,
        *after,
    )


async def set_email_key(db: Executor, *, user: UUID, email_key: str) -> bool:
    """Set the key of an account; return whether the key was free.

    Raises:
        asyncpg.UniqueViolationError: another account got the key at the same moment.
    """
    return bool(
        await db.fetchval(
            """
            UPDATE users SET email_key = $2
            WHERE id = $1 AND NOT EXISTS (SELECT FROM users WHERE email_key = $2) RETURNING true
            """,
            user,
            email_key,
        )
    )
