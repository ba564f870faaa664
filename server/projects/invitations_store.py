"""SQL statements of invitations to projects."""

from datetime import datetime
from typing import Any
from uuid import UUID

from asyncpg import Record

from server.postgres import Executor


async def invite(
    db: Executor,
    *,
    project: UUID,
    actor: UUID,
    email: str,
    email_key: str,
    role: str,
    token_hash: bytes,
    expires_at: datetime,
) -> Record | None:
    """Return the pending invitation of that address, new or with a new token; None if the project is deleted."""
    return await db.fetchrow(
        """
        WITH project AS MATERIALIZED (
            SELECT id FROM projects WHERE id = $1 FOR KEY SHARE
        ), invited AS (
            INSERT INTO invitations (project_id, email, email_key, role, token_hash, invited_by, expires_at)
            SELECT id, $3, $7, $4, $5, $2, $6 FROM project
            ON CONFLICT (project_id, lower(email)) DO UPDATE
                SET role = EXCLUDED.role, token_hash = EXCLUDED.token_hash, invited_by = EXCLUDED.invited_by,
                    created_at = now(), expires_at = EXCLUDED.expires_at
            RETURNING *
        ), noted AS (
            INSERT INTO activity (project_id, actor_id, action, subject)
            SELECT $1, $2, 'invitation.created', jsonb_build_object('email', email, 'role', role) FROM invited
        )
        SELECT i.id, i.project_id, i.email, i.role, i.expires_at, i.created_at, person(u) AS invited_by
        FROM invited i LEFT JOIN users u ON u.id = $2
        """,
        project,
        actor,
        email,
        role,
        token_hash,
        expires_at,
        email_key,
    )


async def list_invitations(
    db: Executor, *, project: UUID | None, user: UUID | None, limit: int, after: tuple[Any, Any]
) -> list[Record]:
    """Return pending invitations of a project, or to a user's address; newest first; one more than ``limit``."""
    return await db.fetch(
        """
        SELECT i.id, i.project_id, i.email, i.role, i.expires_at, i.created_at,
               person(u) AS invited_by
        FROM invitations i LEFT JOIN users u ON u.id = i.invited_by
        WHERE ($1::uuid IS NULL OR i.project_id = $1)
          AND ($2::uuid IS NULL OR i.email_key = (SELECT email_key FROM users WHERE id = $2))
          AND i.expires_at > now()
          AND ($4::timestamptz IS NULL OR (i.created_at, i.id) < ($4, $5::uuid))
        ORDER BY i.created_at DESC, i.id DESC LIMIT $3 + 1
        """,
        project,
        user,
        limit,
        *after,
    )


async def withdraw_invitation(db: Executor, *, project: UUID, actor: UUID, invitation: UUID) -> bool:
    return bool(
        await db.fetchval(
            """
            WITH project AS MATERIALIZED (
                SELECT id FROM projects WHERE id = $1 FOR KEY SHARE
            ), gone AS (
                DELETE FROM invitations i USING project
                WHERE i.project_id = project.id AND i.id = $3 RETURNING email
            ), noted AS (
                INSERT INTO activity (project_id, actor_id, action, subject)
                SELECT $1, $2, 'invitation.withdrawn', jsonb_build_object('email', email) FROM gone
            )
            SELECT true FROM gone
            """,
            project,
            actor,
            invitation,
        )
    )


async def accept_invitation(db: Executor, *, user: UUID, token_hash: bytes) -> Record | None:
    """Use up an invitation that is pending and addressed to the user; return ``project_id`` and ``role``, or None."""
    return await db.fetchrow(
        """
        WITH joiner AS MATERIALIZED (
            SELECT email_key FROM users WHERE id = $1 FOR SHARE
        ), project AS MATERIALIZED (
            SELECT p.id FROM joiner, invitations i JOIN projects p ON p.id = i.project_id
            WHERE i.token_hash = $2 FOR NO KEY UPDATE OF p
        ), used AS (
            DELETE FROM invitations i USING joiner, project
            WHERE i.token_hash = $2 AND i.project_id = project.id AND i.expires_at > now()
              AND i.email_key = joiner.email_key
            RETURNING i.project_id, i.role
        ), joined AS (
            INSERT INTO members (project_id, user_id, role) SELECT project_id, $1, role FROM used
            ON CONFLICT (project_id, user_id) DO NOTHING
        ), noted AS (
            INSERT INTO activity (project_id, actor_id, action, subject)
            SELECT project_id, $1, 'invitation.accepted', jsonb_build_object('userId', $1::uuid, 'role', role)
            FROM used
        )
        SELECT project_id, role FROM used
        """,
        user,
        token_hash,
    )


async def invitation_state(db: Executor, *, token_hash: bytes) -> Record | None:
    """Return ``expired`` of an invitation that could not be accepted; None if there is none."""
    return await db.fetchrow("SELECT expires_at <= now() AS expired FROM invitations WHERE token_hash = $1", token_hash)


async def delete_expired_invitations(db: Executor, *, retention_days: int, limit: int) -> int:
    """Delete a batch of invitations that expired long ago; return how many."""
    deleted: int = await db.fetchval(
        """
        WITH forgotten AS (
            DELETE FROM invitations WHERE id IN (
                SELECT id FROM invitations WHERE expires_at < now() - make_interval(days => $1) LIMIT $2
                FOR UPDATE SKIP LOCKED
            ) RETURNING id
        )
        SELECT count(*) FROM forgotten
        """,
        retention_days,
        limit,
    )
    return deleted


async def invitations_without_email_key(db: Executor, *, limit: int) -> list[Record]:
    return await db.fetch("SELECT id, email FROM invitations WHERE email_key IS NULL LIMIT $1", limit)


async def set_email_key(db: Executor, *, invitation: UUID, email_key: str) -> None:
    await db.execute("UPDATE invitations SET email_key = $2 WHERE id = $1", invitation, email_key)
