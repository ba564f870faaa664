"""SQL of projects, their members, invitations and activity."""

from datetime import datetime
from typing import Any
from uuid import UUID

from asyncpg import Record

from server.postgres import Executor


async def create_project(
    db: Executor, *, owner: UUID, name: str, description: str, settings: dict[str, Any]
) -> Record | None:
    """The project as its owner sees it; None where there is no such user any more."""
    return await db.fetchrow(
        """
        WITH made AS (
            INSERT INTO projects (name, description, settings) SELECT $2, $3, $4 FROM users WHERE id = $1 RETURNING *
        ), member AS (
            INSERT INTO members (project_id, user_id, role) SELECT id, $1, 'OWNER' FROM made
        ), noted AS (
            INSERT INTO activity (project_id, actor_id, action, subject)
            SELECT id, $1, 'project.created', jsonb_build_object('name', $2::text) FROM made
        )
        SELECT made.*, 'OWNER' AS role, shown_person(u) AS owner, '{"workspaces":0,"collaborators":1}' AS counts
        FROM made JOIN users u ON u.id = $1
        """,
        owner,
        name,
        description,
        settings,
    )


async def read_project(db: Executor, *, project: UUID) -> Record | None:
    return await db.fetchrow(
        "SELECT p.*, d.owner, d.counts FROM projects p JOIN project_details d ON d.project_id = p.id WHERE p.id = $1",
        project,
    )


async def read_project_with_members(db: Executor, *, project: UUID, most: int) -> Record | None:
    """The project with its first ``most`` workspaces and members, oldest first."""
    return await db.fetchrow(
        """
        SELECT p.*, d.owner, d.counts,
            (SELECT COALESCE(jsonb_agg(w ORDER BY w.created_at, w.id), '[]') FROM (
                SELECT id, project_id, name, description, meta, created_at, updated_at FROM workspaces
                WHERE project_id = p.id ORDER BY created_at, id LIMIT $2) w) AS workspaces,
            (SELECT COALESCE(jsonb_agg(c ORDER BY c.joined_at, c.id), '[]') FROM (
                SELECT m.id, m.role, m.joined_at,
                       (SELECT person(u) FROM users u WHERE u.id = m.user_id) AS "user"
                FROM members m WHERE m.project_id = p.id ORDER BY m.joined_at, m.id LIMIT $2) c) AS collaborators
        FROM projects p JOIN project_details d ON d.project_id = p.id WHERE p.id = $1
        """,
        project,
        most,
    )


async def list_projects(
    db: Executor,
    *,
    user: UUID,
    which: str | None,
    search: str | None,
    sort: str,
    descending: bool,
    limit: int,
    after: tuple[Any, Any],
) -> list[Record]:
    """Which projects of the user, in what revision and with what role of theirs; one more than ``limit``.

    In the order of ``sort``; ``key`` is the sort key.
    """
    return await db.fetch(
        """
        WITH mine AS (
            SELECT p.id, p.revision, m.role, CASE $4
                WHEN 'name' THEN lower(p.name)
                WHEN 'createdAt' THEN to_char(p.created_at, 'YYYY-MM-DD"T"HH24:MI:SS.US')
                ELSE to_char(p.updated_at, 'YYYY-MM-DD"T"HH24:MI:SS.US') END COLLATE "C" AS key
            FROM members m, LATERAL (SELECT * FROM projects WHERE id = m.project_id LIMIT 1) p
            WHERE m.user_id = $1
              AND ($2::text IS NULL OR (m.role = 'OWNER') = ($2 = 'owned'))
              AND ($3::text IS NULL OR strpos(lower(p.name), lower($3)) > 0
                   OR strpos(lower(p.description), lower($3)) > 0)
        )
        SELECT * FROM mine
        WHERE $7::text IS NULL OR CASE WHEN $5::boolean THEN (key, id) < ($7, $8::uuid)
                                       ELSE (key, id) > ($7, $8) END
        ORDER BY CASE WHEN $5 THEN key END DESC, CASE WHEN $5 THEN id END DESC, key, id
        LIMIT $6 + 1
        """,
        user,
        which,
        search,
        sort,
        descending,
        limit,
        *after,
    )


async def read_projects(db: Executor, *, projects: list[UUID]) -> list[Record]:
    """Those of them that there are, in no order."""
    return await db.fetch(
        """
        SELECT p.*, d.owner, d.counts
        FROM unnest($1::uuid[]) AS asked(id), LATERAL (SELECT * FROM projects WHERE id = asked.id LIMIT 1) p,
             LATERAL (SELECT * FROM project_details WHERE project_id = asked.id LIMIT 1) d
        """,
        projects,
    )


async def change_project(
    db: Executor,
    *,
    project: UUID,
    actor: UUID,
    name: str | None,
    description: str | None,
    settings: dict[str, Any] | None,
    revisions: list[int] | None,
) -> Record | None:
    """The changed project; None where it is gone or its revision is none of these."""
    return await db.fetchrow(
        """
        WITH changed AS (
            UPDATE projects SET name = COALESCE($3, name), description = COALESCE($4, description),
                                settings = COALESCE($5, settings), revision = revision + 1, updated_at = now()
            WHERE id = $1 AND ($6::bigint[] IS NULL OR revision = ANY ($6)) RETURNING *
        ), noted AS (
            INSERT INTO activity (project_id, actor_id, action, subject)
            SELECT id, $2, 'project.updated', jsonb_build_object('name', name) FROM changed
        )
        SELECT changed.*, d.owner, d.counts FROM changed JOIN project_details d ON d.project_id = changed.id
        """,
        project,
        actor,
        name,
        description,
        settings,
        revisions,
    )


async def delete_project(db: Executor, *, project: UUID, revisions: list[int] | None) -> bool:
    return bool(
        await db.fetchval(
            "DELETE FROM projects WHERE id = $1 AND ($2::bigint[] IS NULL OR revision = ANY ($2)) RETURNING true",
            project,
            revisions,
        )
    )


async def user_id_by_email(db: Executor, *, email: str) -> UUID | None:
    found: UUID | None = await db.fetchval("SELECT id FROM users WHERE lower(email) = lower($1)", email)
    return found


async def add_member(db: Executor, *, project: UUID, actor: UUID, user: UUID, role: str) -> Record | None:
    """The new member (a pending invitation of theirs is used up); None where they are one already."""
    return await db.fetchrow(
        """
        WITH added AS (
            INSERT INTO members (project_id, user_id, role) VALUES ($1, $3, $4)
            ON CONFLICT (project_id, user_id) DO NOTHING RETURNING *
        ), used AS (
            DELETE FROM invitations i USING users u, added
            WHERE u.id = added.user_id AND i.project_id = $1 AND lower(i.email) = lower(u.email)
        ), noted AS (
            INSERT INTO activity (project_id, actor_id, action, subject)
            SELECT $1, $2, 'collaborator.added', jsonb_build_object('userId', user_id, 'role', role) FROM added
        )
        SELECT added.id, added.role, added.joined_at, person(u) AS "user"
        FROM added JOIN users u ON u.id = added.user_id
        """,
        project,
        actor,
        user,
        role,
    )


async def list_members(db: Executor, *, project: UUID, limit: int, after: tuple[Any, Any]) -> list[Record]:
    """Members, the owner among them, in the order in which they joined; one more than ``limit``."""
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
    """The member with the new role; None where there is none, or they are the owner."""
    return await db.fetchrow(
        """
        WITH changed AS (
            UPDATE members SET role = $4 WHERE project_id = $1 AND id = $3 AND role <> 'OWNER' RETURNING *
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
    """Who was removed, and the actor's name; None where there is none, or they are the owner."""
    return await db.fetchrow(
        """
        WITH gone AS (
            DELETE FROM members WHERE project_id = $1 AND id = $3 AND role <> 'OWNER' RETURNING user_id
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


async def step_down(db: Executor, *, project: UUID, owner: UUID) -> bool:
    """First half of a transfer: whether that user was the owner and is a collaborator now."""
    return bool(
        await db.fetchval(
            """
            UPDATE members SET role = 'COLLABORATOR'
            WHERE project_id = $1 AND user_id = $2 AND role = 'OWNER' RETURNING true
            """,
            project,
            owner,
        )
    )


async def step_up(db: Executor, *, project: UUID, actor: UUID, user: UUID) -> bool:
    """Second half of a transfer: whether that user is a member and the owner now."""
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


async def invite(
    db: Executor,
    *,
    project: UUID,
    actor: UUID,
    email: str,
    role: str,
    token_hash: bytes,
    expires_at: datetime,
) -> Record:
    """The pending invitation of that address: new, or renewed with a new token."""
    row = await db.fetchrow(
        """
        WITH invited AS (
            INSERT INTO invitations (project_id, email, role, token_hash, invited_by, expires_at)
            VALUES ($1, $3, $4, $5, $2, $6)
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
    )
    assert row is not None
    return row


async def list_invitations(
    db: Executor, *, project: UUID | None, user: UUID | None, limit: int, after: tuple[Any, Any]
) -> list[Record]:
    """Pending invitations of a project, or those sent to a user's address; newest first; one more than ``limit``."""
    return await db.fetch(
        """
        SELECT i.id, i.project_id, i.email, i.role, i.expires_at, i.created_at,
               person(u) AS invited_by
        FROM invitations i LEFT JOIN users u ON u.id = i.invited_by
        WHERE ($1::uuid IS NULL OR i.project_id = $1)
          AND ($2::uuid IS NULL OR lower(i.email) = (SELECT lower(email) FROM users WHERE id = $2))
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
            WITH gone AS (
                DELETE FROM invitations WHERE project_id = $1 AND id = $3 RETURNING email
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
    """``project_id`` and ``role`` where the invitation is alive and addressed to the user; it is used up."""
    return await db.fetchrow(
        """
        WITH used AS (
            DELETE FROM invitations
            WHERE token_hash = $2 AND expires_at > now()
              AND lower(email) = (SELECT lower(email) FROM users WHERE id = $1)
            RETURNING project_id, role
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
    """``expired`` of an invitation that could not be accepted; None where there is none."""
    return await db.fetchrow("SELECT expires_at <= now() AS expired FROM invitations WHERE token_hash = $1", token_hash)


async def forget_invitations(db: Executor, *, keep_days: int, most: int) -> int:
    """Housekeeping: how many that expired long ago are gone now."""
    forgotten: int = await db.fetchval(
        """
        WITH forgotten AS (
            DELETE FROM invitations WHERE id IN (
                SELECT id FROM invitations WHERE expires_at < now() - make_interval(days => $1) LIMIT $2
            ) RETURNING id
        )
        SELECT count(*) FROM forgotten
        """,
        keep_days,
        most,
    )
    return forgotten


async def list_activity(db: Executor, *, project: UUID, limit: int, before: int | None) -> list[Record]:
    """Newest first; one more than ``limit``."""
    return await db.fetch(
        """
        SELECT a.id, a.action, a.subject, a.at,
               person(u) AS actor
        FROM activity a LEFT JOIN users u ON u.id = a.actor_id
        WHERE a.project_id = $1 AND ($3::bigint IS NULL OR a.id < $3)
        ORDER BY a.id DESC LIMIT $2 + 1
        """,
        project,
        limit,
        before,
    )


async def audience(db: Executor, *, project: UUID, actor: UUID) -> Record:
    """Who tells whom: ``name`` of the actor, and the ``workspaces`` of the project, whose rooms will hear."""
    row = await db.fetchrow(
        """
        SELECT COALESCE((SELECT name FROM users WHERE id = $2), '') AS name,
               ARRAY(SELECT id FROM workspaces WHERE project_id = $1 ORDER BY created_at, id) AS workspaces
        """,
        project,
        actor,
    )
    assert row is not None
    return row
