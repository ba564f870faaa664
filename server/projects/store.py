"""SQL statements of projects and their activity."""

from typing import Any
from uuid import UUID

from asyncpg import Record

from server.postgres import Executor, Revisions


async def create_project(
    db: Executor, *, owner: UUID, name: str, description: str, settings: dict[str, Any]
) -> Record | None:
    """Create a project and return it as its owner sees it; None if the user is deleted."""
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


async def read_project_with_members(db: Executor, *, project: UUID, limit: int) -> Record | None:
    """Return the project with its first ``limit`` workspaces and members, oldest first."""
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
        limit,
    )


async def list_projects(
    db: Executor,
    *,
    user: UUID,
    ownership: str | None,
    search: str | None,
    sort: str,
    descending: bool,
    limit: int,
    after: tuple[Any, Any],
) -> list[Record]:
    """Return ``id``, ``revision``, ``role`` and sort key (``key``) of the user's projects; one more than ``limit``."""
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
        ownership,
        search,
        sort,
        descending,
        limit,
        *after,
    )


async def read_projects(db: Executor, *, projects: list[UUID]) -> list[Record]:
    """Return those of the projects that exist, in no particular order."""
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
    revisions: Revisions | None,
) -> Record | None:
    """Change and return the project; None if it is deleted or its revision is not in ``revisions``."""
    return await db.fetchrow(
        """
        WITH changed AS (
            UPDATE projects SET name = COALESCE($3, name), description = COALESCE($4, description),
                                settings = COALESCE($5, settings), revision = revision + 1, updated_at = now()
            WHERE id = $1 AND ($6::int8multirange IS NULL OR revision <@ $6) RETURNING *
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


async def delete_project(db: Executor, *, project: UUID, revisions: Revisions | None) -> bool:
    return bool(
        await db.fetchval(
            "DELETE FROM projects WHERE id = $1 AND ($2::int8multirange IS NULL OR revision <@ $2) RETURNING true",
            project,
            revisions,
        )
    )


async def list_activity(db: Executor, *, project: UUID, limit: int, before: int | None) -> list[Record]:
    """Return the activity of a project, newest first; one more than ``limit``."""
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


async def read_event_context(db: Executor, *, project: UUID, actor: UUID) -> Record:
    """Return the context of an event: ``name`` of the actor, and ``workspaces`` of the project, which receive it."""
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
