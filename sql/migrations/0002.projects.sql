-- Projects, who is in them, and what happened in them.

CREATE TABLE projects (
    id          uuid PRIMARY KEY DEFAULT gen_random_uuid(),
    name        text NOT NULL CHECK (length(name) BETWEEN 1 AND 100),
    description text NOT NULL DEFAULT '' CHECK (length(description) <= 500),
    settings    jsonb NOT NULL DEFAULT '{}',
    -- Raised by whatever changes what GET shows (the triggers of 0003); the ETag and the cache key.
    revision    bigint NOT NULL DEFAULT 1,
    created_at  timestamptz NOT NULL DEFAULT now(),
    updated_at  timestamptz NOT NULL DEFAULT now()
);

CREATE TABLE members (
    id         uuid PRIMARY KEY DEFAULT gen_random_uuid(),
    project_id uuid NOT NULL REFERENCES projects ON DELETE CASCADE,
    user_id    uuid NOT NULL REFERENCES users ON DELETE CASCADE,
    role       text NOT NULL CHECK (role IN ('OWNER', 'COLLABORATOR', 'VIEWER')),
    joined_at  timestamptz NOT NULL DEFAULT now(),
    UNIQUE (project_id, user_id)
);

-- Exactly one owner: this index forbids a second, and no statement removes the first.
CREATE UNIQUE INDEX members_owner_key ON members (project_id) WHERE role = 'OWNER';
CREATE INDEX members_user_id ON members (user_id, role);

CREATE TABLE invitations (
    id         uuid PRIMARY KEY DEFAULT gen_random_uuid(),
    project_id uuid NOT NULL REFERENCES projects ON DELETE CASCADE,
    email      text NOT NULL CHECK (length(email) <= 254),
    role       text NOT NULL CHECK (role IN ('COLLABORATOR', 'VIEWER')),
    token_hash bytea NOT NULL UNIQUE,
    invited_by uuid REFERENCES users ON DELETE SET NULL,
    created_at timestamptz NOT NULL DEFAULT now(),
    expires_at timestamptz NOT NULL
);

CREATE UNIQUE INDEX invitations_email_key ON invitations (project_id, lower(email));
CREATE INDEX invitations_email ON invitations (lower(email));

CREATE TABLE activity (
    id         bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    project_id uuid NOT NULL REFERENCES projects ON DELETE CASCADE,
    actor_id   uuid REFERENCES users ON DELETE SET NULL,
    action     text NOT NULL CHECK (length(action) <= 64),
    subject    jsonb NOT NULL DEFAULT '{}',
    at         timestamptz NOT NULL DEFAULT now()
);

CREATE INDEX activity_project_id ON activity (project_id, id DESC);
