"""SQL of documents: their rows, their log of updates, snapshots and named versions.

Every update takes its number while the row of its document is locked, so numbers have no gaps, and who sees
one sees all before it.
"""

from collections.abc import Sequence
from uuid import UUID

from asyncpg import Record

from server.postgres import Executor, Revisions


async def create_document(
    db: Executor, *, project: UUID, workspace: UUID, actor: UUID, path: str, mime_type: str, size: int, update: bytes
) -> Record | None:
    """Return the new document, with ``actor_name``; None if the workspace is deleted.

    Documents of a workspace are created one after the other: a path may be no folder of another one's.

    Raises:
        asyncpg.UniqueViolationError: the path is taken, or a folder of another document's path, or the reverse.
    """
    return await db.fetchrow(
        """
        WITH project AS MATERIALIZED (
            SELECT id FROM projects WHERE id = $1 FOR KEY SHARE
        ), workspace AS MATERIALIZED (
            SELECT w.id FROM project JOIN workspaces w ON w.project_id = project.id
            WHERE w.id = $2 FOR NO KEY UPDATE OF w
        ), made AS (
            INSERT INTO documents (workspace_id, path, mime_type, size, updated_by)
            SELECT id, $4, $5, $6, $3 FROM workspace RETURNING *
        ), logged AS (
            INSERT INTO document_updates (document_id, version, author_id, at, data)
            SELECT id, version, $3, created_at, $7 FROM made
        ), named AS (
            INSERT INTO document_versions (document_id, version, cause, created_at, author_id, size)
            SELECT id, version, 'created', created_at, $3, size FROM made
        ), noted AS (
            INSERT INTO activity (project_id, actor_id, action, subject)
            SELECT $1, $3, 'document.created', jsonb_build_object('documentId', made.id, 'path', path) FROM made
        )
        SELECT made.*, (SELECT name FROM users WHERE id = $3) AS actor_name FROM made
        """,
        project,
        workspace,
        actor,
        path,
        mime_type,
        size,
        update,
    )


async def read_document(db: Executor, *, document: UUID) -> Record | None:
    return await db.fetchrow("SELECT * FROM documents WHERE id = $1", document)


async def list_documents(db: Executor, *, workspace: UUID, limit: int, after: str | None) -> list[Record]:
    """In the order of their paths; one more than ``limit``."""
    return await db.fetch(
        """
        SELECT * FROM documents WHERE workspace_id = $1 AND ($3::text IS NULL OR path > $3)
        ORDER BY path LIMIT $2 + 1
        """,
        workspace,
        limit,
        after,
    )


async def list_files(db: Executor, *, workspace: UUID, limit: int, after: str | None) -> list[Record]:
    """As ``list_documents``, with ``is_folder``: whether the path is a folder of another document's path."""
    return await db.fetch(
        """
        SELECT d.id, d.path, d.mime_type, d.size, d.updated_at, EXISTS (
            SELECT FROM documents i
            WHERE i.workspace_id = d.workspace_id AND i.path > d.path || '/' AND i.path < d.path || '0'
        ) AS is_folder
        FROM documents d WHERE d.workspace_id = $1 AND ($3::text IS NULL OR d.path > $3)
        ORDER BY d.path LIMIT $2 + 1
        """,
        workspace,
        limit,
        after,
    )


async def rename_document(
    db: Executor, *, project: UUID, document: UUID, actor: UUID, path: str, mime_type: str, revisions: Revisions | None
) -> Record | None:
    """The renamed document; None where it is gone or its revision is not in the set.

    Renames within a workspace run one after the other: two that swap paths would each wait for the other's.

    Raises:
        asyncpg.UniqueViolationError: as ``create_document``.
    """
    return await db.fetchrow(
        """
        WITH project AS MATERIALIZED (
            SELECT id FROM projects WHERE id = $1 FOR KEY SHARE
        ), workspace AS MATERIALIZED (
            SELECT w.id FROM project JOIN workspaces w ON w.project_id = project.id
            WHERE w.id = (SELECT workspace_id FROM documents WHERE id = $2) FOR NO KEY UPDATE OF w
        ), changed AS (
            UPDATE documents d SET path = $4, mime_type = $5, revision = revision + 1
            FROM workspace
            WHERE d.id = $2 AND d.workspace_id = workspace.id AND ($6::int8multirange IS NULL OR revision <@ $6)
            RETURNING d.*
        ), noted AS (
            INSERT INTO activity (project_id, actor_id, action, subject)
            SELECT $1, $3, 'document.renamed', jsonb_build_object('documentId', id, 'path', path) FROM changed
        )
        SELECT changed.*, (SELECT name FROM users WHERE id = $3) AS actor_name FROM changed
        """,
        project,
        document,
        actor,
        path,
        mime_type,
        revisions,
    )


async def delete_document(
    db: Executor, *, project: UUID, document: UUID, actor: UUID, revisions: Revisions | None
) -> Record | None:
    """What was deleted; None where it is gone or its revision is not in the set."""
    return await db.fetchrow(
        """
        WITH project AS MATERIALIZED (
            SELECT id FROM projects WHERE id = $1 FOR KEY SHARE
        ), gone AS (
            DELETE FROM documents d USING project
            WHERE d.id = $2 AND ($4::int8multirange IS NULL OR revision <@ $4) RETURNING d.*
        ), noted AS (
            INSERT INTO activity (project_id, actor_id, action, subject)
            SELECT $1, $3, 'document.deleted', jsonb_build_object('documentId', id, 'path', path) FROM gone
        )
        SELECT gone.*, (SELECT name FROM users WHERE id = $3) AS actor_name FROM gone
        """,
        project,
        document,
        actor,
        revisions,
    )


async def read_snapshot(db: Executor, *, document: UUID) -> Record | None:
    """Where a log begins: ``kept_version`` and ``state`` (0 and None without a snapshot); the newest ``version``, and
    the document's ``revision`` with it.

    None where there is no such document.
    """
    return await db.fetchrow(
        """
        SELECT d.id, d.version, d.revision, d.kept_version, s.state
        FROM documents d LEFT JOIN document_snapshots s ON s.document_id = d.id WHERE d.id = $1
        """,
        document,
    )


async def read_log(db: Executor, *, document: UUID, after: int, limit: int, limit_bytes: int) -> list[Record]:
    """Updates after a version, oldest first; none beyond so many bytes, but always the first."""
    return await db.fetch(
        """
        SELECT version, author_id, data FROM (
            SELECT version, author_id, data,
                   sum(octet_length(data)) OVER (ORDER BY version) - octet_length(data) AS bytes_before
            FROM document_updates WHERE document_id = $1 AND version > $2 ORDER BY version LIMIT $3
        ) page
        WHERE bytes_before < $4 ORDER BY version
        """,
        document,
        after,
        limit,
        limit_bytes,
    )


async def read_heads(db: Executor, *, documents: Sequence[UUID]) -> list[Record]:
    """Of those that exist: how far they are."""
    return await db.fetch("SELECT id, version, size FROM documents WHERE id = ANY ($1)", documents)


async def correct_size(db: Executor, *, document: UUID, version: int, size: int) -> None:
    """Processes that write at once each know only their own part; whoever knows this version knows better."""
    await db.execute(
        """
        UPDATE documents SET size = $3, revision = revision + 1 WHERE id = $1 AND version = $2 AND size <> $3
        """,
        document,
        version,
        size,
    )


async def append(
    db: Executor,
    *,
    documents: Sequence[UUID],
    authors: Sequence[UUID],
    updates: Sequence[bytes],
    sizes: Sequence[int],
    pause_seconds: float,
) -> list[Record]:
    """Append updates to the logs of any number of documents, in one commit; ``sizes`` are of the texts afterwards.

    A row for each, in their order: ``document``, whether it ``exists``, and ``version``, which is None where it does
    not, or the author may not edit it (any more). Where nobody had edited for so long, what was there before gets a
    name: ``paused_version``, by ``paused_by`` (with ``paused_name``), in ``workspace_id`` at ``path``.
    """
    return await db.fetch(
        """
        WITH given AS (
            SELECT * FROM unnest($1::uuid[], $2::uuid[], $3::bytea[], $4::bigint[])
                WITH ORDINALITY AS g (document, author, data, size, place)
        ), locked AS MATERIALIZED (
            -- In one order, so that two processes cannot wait for each other.
            SELECT id, workspace_id, version, named_version, size, updated_at, updated_by FROM documents
            WHERE id = ANY ($1) ORDER BY id FOR NO KEY UPDATE
        ), allowed AS (
            SELECT DISTINCT l.id, m.user_id
            FROM locked l JOIN workspaces w ON w.id = l.workspace_id JOIN members m ON m.project_id = w.project_id
            WHERE m.user_id = ANY ($2) AND m.role <> 'VIEWER'
        ), numbered AS (
            SELECT g.*, row_number() OVER (PARTITION BY g.document ORDER BY g.place) AS n,
                   lead(g.place) OVER (PARTITION BY g.document ORDER BY g.place) IS NULL AS last
            FROM given g JOIN allowed a ON a.id = g.document AND a.user_id = g.author
        ), advanced AS (
            UPDATE documents d SET version = l.version + n.n, size = n.size, revision = d.revision + 1,
                updated_at = clock_timestamp(), updated_by = n.author,
                named_version = CASE WHEN l.named_version < l.version
                    AND l.updated_at < clock_timestamp() - make_interval(secs => $5) THEN l.version
                    ELSE l.named_version END
            FROM locked l JOIN numbered n ON n.document = l.id AND n.last
            WHERE d.id = l.id
            RETURNING d.id, d.workspace_id, d.path, d.updated_at, l.version AS base,
                CASE WHEN d.named_version > l.named_version THEN l.version END AS paused_version,
                l.updated_by AS paused_by, l.updated_at AS paused_at, l.size AS paused_size
        ), logged AS (
            INSERT INTO document_updates (document_id, version, author_id, at, data)
            SELECT a.id, a.base + n.n, n.author, a.updated_at, n.data
            FROM advanced a JOIN numbered n ON n.document = a.id
        ), named AS (
            INSERT INTO document_versions (document_id, version, cause, created_at, author_id, size)
            SELECT id, paused_version, 'pause', paused_at, paused_by, paused_size FROM advanced
            WHERE paused_version IS NOT NULL
        )
        SELECT g.document, EXISTS (SELECT FROM locked l WHERE l.id = g.document) AS exists,
               a.base + n.n AS version, a.workspace_id, a.path,
               CASE WHEN n.last THEN a.paused_version END AS paused_version, a.paused_by,
               CASE WHEN n.last AND a.paused_version IS NOT NULL
                   THEN (SELECT name FROM users WHERE id = a.paused_by) END AS paused_name
        FROM given g LEFT JOIN numbered n ON n.place = g.place LEFT JOIN advanced a ON a.id = n.document
        ORDER BY g.place
        """,
        documents,
        authors,
        updates,
        sizes,
        pause_seconds,
    )


async def append_named(
    db: Executor,
    *,
    document: UUID,
    author: UUID,
    update: bytes,
    size: int,
    cause: str,
    version: int | None,
    revision: int | None,
    pause_seconds: float,
) -> Record | None:
    """Append an update whose outcome gets a name; None where the document is gone or not at this version and revision.

    The document, with ``author_name`` and, where nobody had edited for so long, ``paused_version`` as above; its
    ``version`` is None where the author may not edit it (any more).
    """
    return await db.fetchrow(
        """
        WITH locked AS MATERIALIZED (
            SELECT id, workspace_id, version, named_version, size, updated_at, updated_by FROM documents
            WHERE id = $1 AND ($6::bigint IS NULL OR version = $6) AND ($7::bigint IS NULL OR revision = $7)
            FOR NO KEY UPDATE
        ), advanced AS (
            UPDATE documents d SET version = l.version + 1, size = $4, revision = d.revision + 1,
                updated_at = clock_timestamp(), updated_by = $2, named_version = l.version + 1
            FROM locked l JOIN workspaces w ON w.id = l.workspace_id JOIN members m ON m.project_id = w.project_id
            WHERE d.id = l.id AND m.user_id = $2 AND m.role <> 'VIEWER'
            RETURNING d.*, l.updated_by AS paused_by, l.updated_at AS paused_at, l.size AS paused_size,
                CASE WHEN l.named_version < l.version
                    AND l.updated_at < clock_timestamp() - make_interval(secs => $8) THEN l.version
                END AS paused_version
        ), logged AS (
            INSERT INTO document_updates (document_id, version, author_id, at, data)
            SELECT id, version, $2, updated_at, $3 FROM advanced
        ), named AS (
            INSERT INTO document_versions (document_id, version, cause, created_at, author_id, size)
            SELECT id, paused_version, 'pause', paused_at, paused_by, paused_size FROM advanced
            WHERE paused_version IS NOT NULL
            UNION ALL SELECT id, version, $5, updated_at, $2, $4 FROM advanced
        )
        SELECT advanced.*, (SELECT name FROM users WHERE id = $2) AS author_name,
               (SELECT name FROM users WHERE paused_version IS NOT NULL AND id = paused_by) AS paused_name
        FROM locked LEFT JOIN advanced ON advanced.id = locked.id
        """,
        document,
        author,
        update,
        size,
        cause,
        version,
        revision,
        pause_seconds,
    )


async def name_pauses(db: Executor, *, pause_seconds: float, limit: int) -> list[Record]:
    """Name what has rested for so long; rows as ``append`` gives them."""
    return await db.fetch(
        """
        WITH resting AS (
            SELECT id FROM documents
            WHERE named_version < version AND updated_at < now() - make_interval(secs => $1)
            ORDER BY updated_at LIMIT $2 FOR NO KEY UPDATE SKIP LOCKED
        ), advanced AS (
            UPDATE documents d SET named_version = d.version FROM resting r WHERE d.id = r.id RETURNING d.*
        ), named AS (
            INSERT INTO document_versions (document_id, version, cause, created_at, author_id, size)
            SELECT id, version, 'pause', updated_at, updated_by, size FROM advanced
        )
        SELECT a.id AS document, a.version AS paused_version, a.path, a.workspace_id, a.updated_by AS paused_by,
               u.name AS paused_name
        FROM advanced a LEFT JOIN users u ON u.id = a.updated_by
        """,
        pause_seconds,
        limit,
    )


async def list_versions(db: Executor, *, document: UUID, limit: int, before: int | None) -> list[Record]:
    """Newest first, without their texts; one more than ``limit``."""
    return await db.fetch(
        """
        SELECT v.version, v.cause, v.created_at, v.size, u.id AS created_by
        FROM document_versions v LEFT JOIN users u ON u.id = v.author_id
        WHERE v.document_id = $1 AND ($3::bigint IS NULL OR v.version < $3)
        ORDER BY v.version DESC LIMIT $2 + 1
        """,
        document,
        limit,
        before,
    )


async def read_version(db: Executor, *, document: UUID, version: int) -> Record | None:
    """A named version; ``content`` is None where the log still reaches back to it."""
    return await db.fetchrow(
        """
        SELECT v.version, v.cause, v.created_at, v.size, v.content, u.id AS created_by
        FROM document_versions v LEFT JOIN users u ON u.id = v.author_id
        WHERE v.document_id = $1 AND v.version = $2
        """,
        document,
        version,
    )


async def list_unkept(db: Executor, *, document: UUID) -> list[Record]:
    """The named versions whose text only the log knows."""
    return await db.fetch(
        "SELECT version FROM document_versions WHERE document_id = $1 AND content IS NULL ORDER BY version", document
    )


async def lock_document(db: Executor, *, document: UUID, kept_version: int) -> bool:
    """Within a transaction: nothing is appended or named until it ends. Whether its snapshot is still that one."""
    return bool(
        await db.fetchval(
            "SELECT true FROM documents WHERE id = $1 AND kept_version = $2 FOR NO KEY UPDATE", document, kept_version
        )
    )


async def keep_snapshot(db: Executor, *, document: UUID, version: int, state: bytes) -> None:
    await db.execute(
        """
        WITH kept AS (
            INSERT INTO document_snapshots AS s (document_id, version, state) VALUES ($1, $2, $3)
            ON CONFLICT (document_id) DO UPDATE SET version = EXCLUDED.version, state = EXCLUDED.state
            WHERE s.version < EXCLUDED.version RETURNING document_id, version
        )
        UPDATE documents d SET kept_version = kept.version FROM kept WHERE d.id = kept.document_id
        """,
        document,
        version,
        state,
    )


async def keep_text(db: Executor, *, document: UUID, version: int, text: str) -> None:
    await db.execute(
        "UPDATE document_versions SET content = $3 WHERE document_id = $1 AND version = $2", document, version, text
    )


async def shorten_log(db: Executor, *, document: UUID, version: int, grace_seconds: float) -> None:
    """Delete what a snapshot holds; the newest stays for those that catch up."""
    await db.execute(
        """
        WITH document AS MATERIALIZED (
            SELECT id FROM documents WHERE id = $1 FOR KEY SHARE
        )
        DELETE FROM document_updates u USING document
        WHERE u.document_id = document.id AND version <= $2 AND at < now() - make_interval(secs => $3)
        """,
        document,
        version,
        grace_seconds,
    )
