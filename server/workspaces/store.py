"""SQL statements of workspaces."""

from typing import Any
from uuid import UUID

from asyncpg import Record

from server.postgres import Database, Executor, Revisions


async def create_workspace(
    db: Executor, *, project: UUID, actor: UUID, name: str, description: str, meta: dict[str, Any]
) -> Record:
    row = await db.fetchrow(
        """
        WITH made AS (
            INSERT INTO workspaces (project_id, name, description, meta) VALUES ($1, $3, $4, $5) RETURNING *
        ), noted AS (
            INSERT INTO activity (project_id, actor_id, action, subject)
            SELECT $1, $2, 'workspace.created', jsonb_build_object('workspaceId', id, 'name', name) FROM made
        )
        SELECT * FROM made
        """,
        project,
        actor,
        name,
        description,
        meta,
    )
    assert row is not None
    return row


async def read_workspace(db: Database, *, workspace: UUID) -> Record | None:
    return await db.fetchrow_batched(
        """
        SELECT asked, found.* FROM unnest($1::uuid[]) WITH ORDINALITY AS keys (key, asked),
        LATERAL (SELECT * FROM workspaces WHERE id = key LIMIT 1) AS found
        """,
        workspace,
    )


async def list_workspaces(
    db: Executor, *, project: UUID, limit: int, after: tuple[Any, Any] = (None, None)
) -> list[Record]:
    """Return the workspaces of a project, oldest first; one more than ``limit``."""
    return await db.fetch(
        """
        SELECT * FROM workspaces
        WHERE project_id = $1 AND ($3::timestamptz IS NULL OR (created_at, id) > ($3, $4::uuid))
        ORDER BY created_at, id LIMIT $2 + 1
        """,
        project,
        limit,
        *after,
    )


async def change_workspace(
    db: Executor,
    *,
    project: UUID,
    workspace: UUID,
    actor: UUID,
    name: str | None,
    description: str | None,
    meta: dict[str, Any] | None,
    revisions: Revisions | None,
) -> Record | None:
    """Change and return the workspace, with ``actor_name``; None if deleted or its revision is not in ``revisions``."""
    return await db.fetchrow(
        """
        WITH project AS MATERIALIZED (
            SELECT id FROM projects WHERE id = $1 FOR NO KEY UPDATE
        ), changed AS (
            UPDATE workspaces w SET name = COALESCE($4, name), description = COALESCE($5, description),
                                    meta = COALESCE($6, meta), revision = revision + 1, updated_at = now()
            FROM project
            WHERE w.id = $2 AND w.project_id = project.id AND ($7::int8multirange IS NULL OR revision <@ $7)
            RETURNING w.*
        ), noted AS (
            INSERT INTO activity (project_id, actor_id, action, subject)
            SELECT project_id, $3, 'workspace.updated', jsonb_build_object('workspaceId', id, 'name', name)
            FROM changed
        )
        SELECT changed.*, (SELECT name FROM users WHERE id = $3) AS actor_name FROM changed
        """,
        project,
        workspace,
        actor,
        name,
        description,
        meta,
        revisions,
    )


async def delete_workspace(
    db: Executor, *, project: UUID, workspace: UUID, actor: UUID, revisions: Revisions | None
) -> Record | None:
    """Delete a workspace and return ``actor_name``; None if it is deleted or its revision is not in ``revisions``."""
    return await db.fetchrow(
        """
        WITH project AS MATERIALIZED (
            SELECT id FROM projects WHERE id = $1 FOR NO KEY UPDATE
        ), gone AS (
            DELETE FROM workspaces w USING project
            WHERE w.id = $2 AND w.project_id = project.id AND ($4::int8multirange IS NULL OR revision <@ $4)
            RETURNING w.*
        ), noted AS (
            INSERT INTO activity (project_id, actor_id, action, subject)
            SELECT project_id, $3, 'workspace.deleted', jsonb_build_object('workspaceId', id, 'name', name)
            FROM gone
        )
        SELECT (SELECT name FROM users WHERE id = $3) AS actor_name FROM gone
        """,
        project,
        workspace,
        actor,
        revisions,
    )
