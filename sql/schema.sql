-- The schema after all migrations, for readers. Never applied: sql/migrations is. A test compares the two.

-- Users, their sessions (devices) and the refresh tokens of each session.

CREATE TABLE users (
    id            uuid PRIMARY KEY DEFAULT gen_random_uuid(),
    -- By this collation lower() changes ASCII letters only.
    email         text COLLATE "C" NOT NULL CHECK (length(email) <= 254),
    name          text NOT NULL CHECK (length(name) BETWEEN 2 AND 100),
    avatar_url    text CHECK (length(avatar_url) <= 2048),
    password_hash text NOT NULL,
    revision      bigint NOT NULL DEFAULT 1,
    created_at    timestamptz NOT NULL DEFAULT now(),
    updated_at    timestamptz NOT NULL DEFAULT now(),
    -- The form in which addresses are compared (server/auth/email_addresses.py). Of accounts with the same key the
    -- oldest has it.
    email_key     text COLLATE "C" CHECK (length(email_key) <= 512)
);

CREATE UNIQUE INDEX users_email_key ON users (email_key);
-- Two accounts cannot sign in with the same spelling.
CREATE UNIQUE INDEX users_email_spelling ON users (lower(email));
-- Accounts without a key sign in with their exact spelling.
CREATE INDEX users_email_without_key ON users (email) WHERE email_key IS NULL;

-- For rows that servers of the previous version insert, without a key.
CREATE FUNCTION fill_email_key() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    NEW.email_key := lower(NEW.email);
    RETURN NEW;
END $$;

CREATE TRIGGER users_fill_email_key BEFORE INSERT ON users
FOR EACH ROW WHEN (NEW.email_key IS NULL AND octet_length(NEW.email) = length(NEW.email))
EXECUTE FUNCTION fill_email_key();

-- The public fields of a user; null without a user.
CREATE FUNCTION person(u users) RETURNS jsonb LANGUAGE sql STABLE AS $$
SELECT CASE WHEN u.id IS NOT NULL THEN
    jsonb_build_object('id', u.id, 'email', u.email, 'name', u.name, 'avatar_url', u.avatar_url) END
$$;

-- A session is a family of refresh tokens of one device. Its row decides whether the session is active.
CREATE TABLE sessions (
    id           uuid PRIMARY KEY DEFAULT gen_random_uuid(),
    user_id      uuid NOT NULL REFERENCES users ON DELETE CASCADE,
    user_agent   text NOT NULL DEFAULT '' CHECK (length(user_agent) <= 512),
    ip           text NOT NULL DEFAULT '' CHECK (length(ip) <= 64),
    created_at   timestamptz NOT NULL DEFAULT now(),
    last_used_at timestamptz NOT NULL DEFAULT now(),
    expires_at   timestamptz NOT NULL,
    ended_at     timestamptz
);

CREATE INDEX sessions_user_id ON sessions (user_id, created_at, id) WHERE ended_at IS NULL;
CREATE INDEX sessions_expires_at ON sessions (expires_at);
CREATE INDEX sessions_ended_at ON sessions (ended_at) WHERE ended_at IS NOT NULL;

-- Only the keyed hash is stored. A spent token stays until its session expires, so that its reuse is detected.
CREATE TABLE refresh_tokens (
    hash       bytea PRIMARY KEY,
    session_id uuid NOT NULL REFERENCES sessions ON DELETE CASCADE,
    parent     bytea,
    created_at timestamptz NOT NULL DEFAULT now(),
    expires_at timestamptz NOT NULL,
    spent_at   timestamptz,
    -- The successor is computed from these and the token; they are erased after seconds.
    salt       bytea,
    key_id     text
);

CREATE INDEX refresh_tokens_session_id ON refresh_tokens (session_id);
CREATE INDEX refresh_tokens_parent ON refresh_tokens (parent);
CREATE INDEX refresh_tokens_salted ON refresh_tokens (spent_at) WHERE salt IS NOT NULL;

-- The networks (an IPv4 address, an IPv6 /64) from which the user of an account has signed in: password guesses from
-- elsewhere do not lock the user out there.
CREATE TABLE known_networks (
    user_id         uuid NOT NULL REFERENCES users ON DELETE CASCADE,
    network         cidr NOT NULL,
    last_sign_in_at timestamptz NOT NULL DEFAULT now(),
    PRIMARY KEY (user_id, network)
);

CREATE INDEX known_networks_last_sign_in_at ON known_networks (last_sign_in_at);

-- Projects, their members, invitations and activity.

CREATE TABLE projects (
    id          uuid PRIMARY KEY DEFAULT gen_random_uuid(),
    name        text NOT NULL CHECK (length(name) BETWEEN 1 AND 100),
    description text NOT NULL DEFAULT '' CHECK (length(description) <= 500),
    settings    jsonb NOT NULL DEFAULT '{}',
    -- The triggers below raise it with every change of the GET response; it is the ETag and the cache key.
    revision    bigint NOT NULL DEFAULT 1,
    created_at  timestamptz NOT NULL DEFAULT now(),
    updated_at  timestamptz NOT NULL DEFAULT now(),
    -- The same triggers maintain these counts.
    workspace_count integer NOT NULL DEFAULT 0,
    member_count    integer NOT NULL DEFAULT 1  -- the owner
);

CREATE TABLE members (
    id         uuid PRIMARY KEY DEFAULT gen_random_uuid(),
    project_id uuid NOT NULL REFERENCES projects ON DELETE CASCADE,
    user_id    uuid NOT NULL REFERENCES users ON DELETE CASCADE,
    role       text NOT NULL CHECK (role IN ('OWNER', 'COLLABORATOR', 'VIEWER')),
    joined_at  timestamptz NOT NULL DEFAULT now(),
    UNIQUE (project_id, user_id)
);

-- A project has exactly one owner: this index forbids a second, and no statement removes the first.
CREATE UNIQUE INDEX members_owner_key ON members (project_id) WHERE role = 'OWNER';
CREATE INDEX members_user_id ON members (user_id, role);

-- Lock the user of a new member, so that their name cannot change meanwhile: that change would not see this project,
-- and its revision would show the old name. The lock comes before that of the project, as in a change of the name.
CREATE FUNCTION hold_new_member() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    PERFORM FROM users WHERE id = NEW.user_id FOR SHARE;
    RETURN NEW;
END $$;

CREATE TRIGGER members_hold_user BEFORE INSERT ON members
FOR EACH ROW EXECUTE FUNCTION hold_new_member();

CREATE TABLE invitations (
    id         uuid PRIMARY KEY DEFAULT gen_random_uuid(),
    project_id uuid NOT NULL REFERENCES projects ON DELETE CASCADE,
    email      text COLLATE "C" NOT NULL CHECK (length(email) <= 254),
    role       text NOT NULL CHECK (role IN ('COLLABORATOR', 'VIEWER')),
    token_hash bytea NOT NULL UNIQUE,
    invited_by uuid,  -- shown as null after the user is deleted
    created_at timestamptz NOT NULL DEFAULT now(),
    expires_at timestamptz NOT NULL,
    email_key  text COLLATE "C" CHECK (length(email_key) <= 512)
);

-- New addresses are stored in their ASCII form; in lower case it is their key.
CREATE UNIQUE INDEX invitations_email_spelling ON invitations (project_id, lower(email));
CREATE INDEX invitations_email_key ON invitations (email_key);
CREATE INDEX invitations_expires_at ON invitations (expires_at);

CREATE TRIGGER invitations_fill_email_key BEFORE INSERT ON invitations
FOR EACH ROW WHEN (NEW.email_key IS NULL AND octet_length(NEW.email) = length(NEW.email))
EXECUTE FUNCTION fill_email_key();

CREATE TABLE activity (
    id         bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    project_id uuid NOT NULL REFERENCES projects ON DELETE CASCADE,
    -- No foreign key: the deletion of a user would have to search the whole table. A deleted user is shown as null.
    actor_id   uuid,
    action     text NOT NULL CHECK (length(action) <= 64),
    subject    jsonb NOT NULL DEFAULT '{}',
    at         timestamptz NOT NULL DEFAULT now()
);

CREATE INDEX activity_project_id ON activity (project_id, id DESC);

-- Keep about the newest 10,000 entries of a project. One insert in a hundred deletes older ones, at most 1,000.
CREATE FUNCTION shorten_activity() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    DELETE FROM activity WHERE id IN (
        SELECT id FROM activity WHERE project_id = NEW.project_id AND id <= (
            SELECT id FROM activity WHERE project_id = NEW.project_id ORDER BY id DESC OFFSET 10000 LIMIT 1)
        ORDER BY id LIMIT 1000 FOR UPDATE SKIP LOCKED);
    RETURN NULL;
END $$;

CREATE TRIGGER activity_shorten AFTER INSERT ON activity
FOR EACH ROW WHEN (NEW.id % 100 = 0) EXECUTE FUNCTION shorten_activity();

-- Workspaces, and the triggers that raise a project's revision when its GET response changes.

CREATE TABLE workspaces (
    id          uuid PRIMARY KEY DEFAULT gen_random_uuid(),
    project_id  uuid NOT NULL REFERENCES projects ON DELETE CASCADE,
    name        text NOT NULL CHECK (length(name) BETWEEN 1 AND 100),
    description text NOT NULL DEFAULT '' CHECK (length(description) <= 500),
    meta        jsonb NOT NULL DEFAULT '{}',
    revision    bigint NOT NULL DEFAULT 1,
    created_at  timestamptz NOT NULL DEFAULT now(),
    updated_at  timestamptz NOT NULL DEFAULT now()
);

CREATE INDEX workspaces_project_id ON workspaces (project_id, created_at, id);

CREATE FUNCTION raise_project_revision() RETURNS trigger LANGUAGE plpgsql AS $$
DECLARE
    more integer := CASE TG_OP WHEN 'INSERT' THEN 1 WHEN 'DELETE' THEN -1 ELSE 0 END;
BEGIN
    UPDATE projects SET
        revision = revision + 1,
        workspace_count = workspace_count + CASE TG_TABLE_NAME WHEN 'workspaces' THEN more ELSE 0 END,
        member_count = member_count + CASE TG_TABLE_NAME WHEN 'members' THEN more ELSE 0 END
    WHERE id = COALESCE(NEW.project_id, OLD.project_id);
    RETURN NULL;
END $$;

CREATE TRIGGER members_raise_revision AFTER UPDATE OR DELETE ON members
FOR EACH ROW EXECUTE FUNCTION raise_project_revision();

-- The owner is inserted with the project itself: its first revision shows them already.
CREATE TRIGGER new_members_raise_revision AFTER INSERT ON members
FOR EACH ROW WHEN (NEW.role <> 'OWNER') EXECUTE FUNCTION raise_project_revision();

-- Triggers fire in the order of their names: this one before the check of the foreign key ("RI_…"), which would take
-- a weaker lock on the project. Two transactions that upgrade such a lock, and a deletion that waits for both, are a
-- deadlock.
CREATE TRIGGER "FIRST_workspaces_raise_revision" AFTER INSERT OR UPDATE OR DELETE ON workspaces
FOR EACH ROW EXECUTE FUNCTION raise_project_revision();

-- Every project shows the names and avatars of its members. Rows are locked in the order of their ids, so that two
-- renames at once cannot deadlock.
CREATE FUNCTION raise_revisions_of_member() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    PERFORM 1 FROM projects
    WHERE id IN (SELECT project_id FROM members WHERE user_id = NEW.id) ORDER BY id FOR NO KEY UPDATE;
    UPDATE projects SET revision = revision + 1
    WHERE id IN (SELECT project_id FROM members WHERE user_id = NEW.id);
    RETURN NULL;
END $$;

CREATE TRIGGER users_raise_revisions AFTER UPDATE OF name, avatar_url, email ON users
FOR EACH ROW WHEN ((OLD.name, OLD.avatar_url, OLD.email) IS DISTINCT FROM (NEW.name, NEW.avatar_url, NEW.email))
EXECUTE FUNCTION raise_revisions_of_member();

-- JSON in the form of the response: servers pass it on unparsed.
CREATE FUNCTION shown_person(u users) RETURNS text LANGUAGE sql STABLE AS $$
SELECT json_build_object('id', u.id, 'email', u.email, 'name', u.name, 'avatarUrl', u.avatar_url)::text
$$;

CREATE FUNCTION shown_counts(p projects) RETURNS text LANGUAGE sql STABLE AS $$
SELECT json_build_object('workspaces', p.workspace_count, 'collaborators', p.member_count)::text
$$;

-- The fields of a project's response that are not its own columns.
CREATE VIEW project_details AS
SELECT p.id AS project_id, shown_counts(p) AS counts, (
    SELECT shown_person(u) FROM members m JOIN users u ON u.id = m.user_id
    WHERE m.project_id = p.id AND m.role = 'OWNER' LIMIT 1
) AS owner
FROM projects p;

-- Documents: files of a workspace. A document is the log of its Yjs updates, kept short by snapshots.

CREATE TABLE documents (
    id             uuid PRIMARY KEY DEFAULT gen_random_uuid(),
    workspace_id   uuid NOT NULL REFERENCES workspaces ON DELETE CASCADE,
    path           text COLLATE "C" NOT NULL CHECK (octet_length(path) BETWEEN 1 AND 512),
    mime_type      text NOT NULL CHECK (length(mime_type) <= 255),
    size           bigint NOT NULL,                -- of the text, in bytes
    version        bigint NOT NULL DEFAULT 1,      -- of the newest update in the log
    named_version  bigint NOT NULL DEFAULT 1,      -- the newest that users can refer to
    kept_version   bigint NOT NULL DEFAULT 0,      -- of the snapshot
    revision       bigint NOT NULL DEFAULT 1,      -- raised by every change of the GET response
    created_at     timestamptz NOT NULL DEFAULT now(),
    updated_at     timestamptz NOT NULL DEFAULT now(),
    -- No foreign key to users, because every keystroke would check it. A deleted user is shown as null.
    updated_by     uuid
) WITH (fillfactor = 70);

CREATE UNIQUE INDEX documents_path_key ON documents (workspace_id, path);
CREATE INDEX documents_unnamed ON documents (updated_at) WHERE named_version < version;

-- A document's path must not be a folder of another document's path, nor the reverse. Older paths stay unchanged.
-- A statement that creates or renames a document locks the workspace's row, so that the check sees all commits of
-- others.
CREATE FUNCTION claim_path() RETURNS trigger LANGUAGE plpgsql AS $$
DECLARE
    names text[] := string_to_array(NEW.path, '/');
BEGIN
    PERFORM FROM workspaces WHERE id = NEW.workspace_id FOR NO KEY UPDATE;
    IF EXISTS (
        SELECT FROM documents WHERE workspace_id = NEW.workspace_id AND id <> NEW.id
            AND path > NEW.path || '/' AND path < NEW.path || '0'  -- the character after /
    ) OR EXISTS (
        SELECT FROM generate_series(1, cardinality(names) - 1) AS depth, LATERAL (
            SELECT FROM documents WHERE workspace_id = NEW.workspace_id AND id <> NEW.id
                AND path = array_to_string(names[:depth], '/') LIMIT 1
        ) AS folder
    ) THEN
        RAISE unique_violation USING MESSAGE = 'a path is a folder of another';
    END IF;
    RETURN NEW;
END $$;

CREATE TRIGGER documents_claim_path BEFORE INSERT ON documents
FOR EACH ROW EXECUTE FUNCTION claim_path();

CREATE TRIGGER renamed_documents_claim_path BEFORE UPDATE OF path ON documents
FOR EACH ROW WHEN (OLD.path <> NEW.path) EXECUTE FUNCTION claim_path();

-- Append-only. Versions have no gaps: the row of the document is locked while its updates get their versions.
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

-- Versions that users can refer to. The content is stored here once the log no longer reaches back to the version.
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

-- A commit of live edits locks documents of any projects in the order of their ids, and no project. So a statement that
-- deletes several documents locks them in that order, too, before the cascade reaches them in another. The query of a
-- trigger sees all that was committed while the trigger waited for its row.
CREATE FUNCTION lock_documents() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    IF TG_TABLE_NAME = 'projects' THEN
        PERFORM FROM documents WHERE workspace_id IN (SELECT id FROM workspaces WHERE project_id = OLD.id)
        ORDER BY id FOR UPDATE;
    ELSE
        PERFORM FROM documents WHERE workspace_id = OLD.id ORDER BY id FOR UPDATE;
    END IF;
    RETURN OLD;
END $$;

CREATE TRIGGER projects_lock_documents BEFORE DELETE ON projects
FOR EACH ROW EXECUTE FUNCTION lock_documents();

CREATE TRIGGER workspaces_lock_documents BEFORE DELETE ON workspaces
FOR EACH ROW EXECUTE FUNCTION lock_documents();

-- Responses to POSTs with an Idempotency-Key, for a day. A row is committed together with the effect of the request,
-- and a retried POST waits for it in the primary key. No foreign key to users: rows expire by themselves.
CREATE TABLE idempotency_keys (
    user_id    uuid NOT NULL,
    route      text NOT NULL CHECK (length(route) <= 200),
    key        text NOT NULL CHECK (length(key) BETWEEN 1 AND 255),
    body_hash  bytea NOT NULL,
    created_at timestamptz NOT NULL DEFAULT now(),
    -- Of the response; null within the transaction only.
    status     smallint,
    headers    jsonb,
    body       bytea,  -- null if it contained a secret
    PRIMARY KEY (user_id, route, key)
);

CREATE INDEX idempotency_keys_created_at ON idempotency_keys (created_at);
