-- Documents: files of a workspace. A document is the log of its Yjs updates, kept short by snapshots.

CREATE TABLE documents (
    id             uuid PRIMARY KEY DEFAULT gen_random_uuid(),
    workspace_id   uuid NOT NULL REFERENCES workspaces ON DELETE CASCADE,
    path           text COLLATE "C" NOT NULL CHECK (octet_length(path) BETWEEN 1 AND 512),
    mime_type      text NOT NULL CHECK (length(mime_type) <= 255),
    size           bigint NOT NULL,                -- of the text, in bytes
    version        bigint NOT NULL DEFAULT 1,      -- of the newest update in the log
    named_version  bigint NOT NULL DEFAULT 1,      -- the newest that users can name
    kept_version   bigint NOT NULL DEFAULT 0,      -- of the snapshot
    revision       bigint NOT NULL DEFAULT 1,      -- raised by whatever changes what GET shows
    created_at     timestamptz NOT NULL DEFAULT now(),
    updated_at     timestamptz NOT NULL DEFAULT now(),
    -- No foreign keys to people on the way of every keystroke: who is gone is shown as nobody.
    updated_by     uuid
) WITH (fillfactor = 70);

CREATE UNIQUE INDEX documents_path_key ON documents (workspace_id, path);
CREATE INDEX documents_unnamed ON documents (updated_at) WHERE named_version < version;

-- Append-only. Numbers have no gaps: the row of the document is locked while its updates get theirs.
CREATE TABLE document_updates (
    document_id uuid NOT NULL REFERENCES documents ON DELETE CASCADE,
    version     bigint NOT NULL,
    author_id   uuid NOT NULL,
    at          timestamptz NOT NULL,
    data        bytea NOT NULL,
    PRIMARY KEY (document_id, version)
);

-- All updates up to a version, merged into one.
CREATE TABLE document_snapshots (
    document_id uuid PRIMARY KEY REFERENCES documents ON DELETE CASCADE,
    version     bigint NOT NULL,
    state       bytea NOT NULL
);

ALTER TABLE document_snapshots ALTER COLUMN state SET STORAGE EXTERNAL;

-- Versions that users can name. The text stands here as soon as the log no longer reaches back to it.
CREATE TABLE document_versions (
    document_id uuid NOT NULL REFERENCES documents ON DELETE CASCADE,
    version     bigint NOT NULL,
    cause       text NOT NULL CHECK (cause IN ('created', 'pause', 'put', 'restore')),
    created_at  timestamptz NOT NULL,
    author_id   uuid,
    size        bigint NOT NULL,
    content     text,
    PRIMARY KEY (document_id, version)
);

CREATE INDEX document_versions_unkept ON document_versions (document_id, version) WHERE content IS NULL;
