-- A document's path is no folder of another document's path, nor the reverse. Paths of before that are stay as they are.
-- Whoever creates or renames holds the workspace's row, so that the check sees what all others have committed.
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

-- What POSTs with an Idempotency-Key have answered, for a day. A row is committed together with the effect, and a
-- repeated POST waits for it in the primary key. No foreign key to people: rows go by themselves.
CREATE TABLE idempotency_keys (
    user_id    uuid NOT NULL,
    route      text NOT NULL CHECK (length(route) <= 200),
    key        text NOT NULL CHECK (length(key) BETWEEN 1 AND 255),
    body_hash  bytea NOT NULL,
    created_at timestamptz NOT NULL DEFAULT now(),
    -- Of the answer; null within the transaction only.
    status     smallint,
    headers    jsonb,
    body       bytea,  -- null where it held a secret
    PRIMARY KEY (user_id, route, key)
);

CREATE INDEX idempotency_keys_created_at ON idempotency_keys (created_at);
