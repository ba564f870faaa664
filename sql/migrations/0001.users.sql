-- People, their sessions (devices) and the refresh tokens of each session.

CREATE TABLE users (
    id            uuid PRIMARY KEY DEFAULT gen_random_uuid(),
    email         text NOT NULL CHECK (length(email) <= 254),
    name          text NOT NULL CHECK (length(name) BETWEEN 2 AND 100),
    avatar_url    text CHECK (length(avatar_url) <= 2048),
    password_hash text NOT NULL,
    revision      bigint NOT NULL DEFAULT 1,
    created_at    timestamptz NOT NULL DEFAULT now(),
    updated_at    timestamptz NOT NULL DEFAULT now()
);

CREATE UNIQUE INDEX users_email_key ON users (lower(email));

-- A session is a family of refresh tokens: what a device holds. Its row is the truth about whether it lives.
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

-- Only the keyed hash is kept. A spent token stays until its session expires, so that its reuse is noticed.
CREATE TABLE refresh_tokens (
    hash       bytea PRIMARY KEY,
    session_id uuid NOT NULL REFERENCES sessions ON DELETE CASCADE,
    parent     bytea,
    created_at timestamptz NOT NULL DEFAULT now(),
    expires_at timestamptz NOT NULL,
    spent_at   timestamptz
);

CREATE INDEX refresh_tokens_session_id ON refresh_tokens (session_id);
CREATE INDEX refresh_tokens_parent ON refresh_tokens (parent);
