"""SQL statements of project members."""

from typing import Any
from uuid import UUID

from asyncpg import Record

from server.postgres import Executor


async def user_id_by_email_key(db: Executor, *, email_key: str) -> UUID | None:
    user: UUID | None = await db.fetchval("SELECT id FROM users WHERE email_key = $1", email_key)
    return user


async def add_member(db: Executor, *, project: UUID, actor: UUID, user: UUID, role: str) -> Record | None:
    """Add a member, and use up the pending invitation of that user.

    Returns the member, with ``id`` None if the user already is one. Returns None if project or user is deleted.
    """
    return await db.fetchrow(
        """
        WITH joiner AS MATERIALIZED (
            SELECT id FROM users WHERE id = $3 FOR SHARE
        ), project AS MATERIALIZED (
            SELECT p.id FROM joiner, projects p WHERE p.id = $1 FOR NO KEY UPDATE OF p
        ), added AS (
            INSERT INTO members (project_id, user_id, role) SELECT id, $3, $4 FROM project
            ON CONFLICT (project_id, user_id) DO NOTHING RETURNING *
        ), used AS (
            DELETE FROM invitations i USING users u, added
            WHERE u.id = added.user_id AND i.project_id = $1 AND i.email_key = u.email_key
        ), noted AS (
            INSERT INTO activity (project_id, actor_id, action, subject)
            SELECT $1, $2, 'collaborator.added', jsonb_build_object('userId', user_id, 'role', role) FROM added
        )
        SELECT added.id, added.role, added.joined_at, person(u) AS "user"
        FROM project JOIN users u ON u.id = $3 LEFT JOIN added ON true
        """,
        project,
        actor,
        user,
        role,
    )


async def list_members(db: Executor, *, project: UUID, limit: int, after: tuple[Any, Any]) -> list[Record]:
    """Return the members, including the owner, in the order in which they joined; one more than ``limit``."""
    return await db.fetch(
        """
        SELECT m.id, m.role, m.joined_at, person(u) AS "user"
        FROM members m JOIN users u ON u.id = m.user_id
        WHERE m.project_id = $1 AND ($3::timestamptz IS NULL OR (m.joined_at, m.id) > ($3, $4::uuid))
        ORDER BY m.joined_at, m.id LIMIT $2 + 1
        """,
        project,
        limit,
        *after,
    )


async def read_member(db: Executor, *, project: UUID, member: UUID) -> Record | None:
    return await db.fetchrow("SELECT id, user_id, role FROM members WHERE project_id = $1 AND id = $2", project, member)


async def change_role(db: Executor, *, project: UUID, actor: UUID, member: UUID, role: str) -> Record | None:
    """Change the role of a member and return the member; None if there is none, or it is the owner."""
    return await db.fetchrow(
        """
        WITH project AS MATERIALIZED (
            SELECT id FROM projects WHERE id = $1 FOR NO KEY UPDATE
        ), changed AS (
            UPDATE members m SET role = $4 FROM project
            WHERE m.project_id = project.id AND m.id = $3 AND role <> 'OWNER' RETURNING m.*
        ), noted AS (
            INSERT INTO activity (project_id, actor_id, action, subject)
            SELECT $1, $2, 'collaborator.role_changed', jsonb_build_object('userId', user_id, 'role', role)
            FROM changed
        )
        SELECT changed.id, changed.user_id, changed.role, changed.joined_at, person(u) AS "user"
        FROM changed JOIN users u ON u.id = changed.user_id
        """,
        project,
        actor,
        member,
        role,
    )


async def remove_member(db: Executor, *, project: UUID, actor: UUID, member: UUID) -> Record | None:
    """Remove a member; return ``user_id`` and ``actor_name``, or None if there is none, or it is the owner."""
    return await db.fetchrow(
        """
        WITH project AS MATERIALIZED (
            SELECT id FROM projects WHERE id = $1 FOR NO KEY UPDATE
        ), gone AS (
            DELETE FROM members m USING project
            WHERE m.project_id = project.id AND m.id = $3 AND role <> 'OWNER' RETURNING user_id
        ), noted AS (
            INSERT INTO activity (project_id, actor_id, action, subject)
            SELECT $1, $2, CASE WHEN user_id = $2 THEN 'collaborator.left' ELSE 'collaborator.removed' END,
                   jsonb_build_object('userId', user_id) FROM gone
        )
        SELECT user_id, COALESCE((SELECT name FROM users WHERE id = $2), '') AS actor_name FROM gone
        """,
        project,
        actor,
        member,
    )


async def demote_owner(db: Executor, *, project: UUID, owner: UUID) -> bool:
    """Make the owner a collaborator (first half of a transfer); return whether that user was the owner."""
    return bool(
        await db.fetchval(
            """
            WITH project AS MATERIALIZED (
                SELECT id FROM projects WHERE id = $1 FOR NO KEY UPDATE
            )
            UPDATE members m SET role = 'COLLABORATOR' FROM project
            WHERE m.project_id = project.id AND user_id = $2 AND role = 'OWNER' RETURNING true
            """,
            project,
            owner,
        )
    )


async def promote_to_owner(db: Executor, *, project: UUID, actor: UUID, user: UUID) -> bool:
    """Make a member the owner (second half of a transfer); return whether that user is a member."""
    return bool(
        await db.fetchval(
            """
            WITH raised AS (
                UPDATE members SET role = 'OWNER' WHERE project_id = $1 AND user_id = $3 RETURNING user_id
            ), noted AS (
                INSERT INTO activity (project_id, actor_id, action, subject)
                SELECT $1, $2, 'project.transferred', jsonb_build_object('userId', user_id) FROM raised
            )
            SELECT true FROM raised
            """,
            project,
            actor,
            user,
        )
    )
