-- Workspaces, and the triggers that raise a project's revision when what its GET shows has changed.

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
BEGIN
    UPDATE projects SET revision = revision + 1 WHERE id = COALESCE(NEW.project_id, OLD.project_id);
    RETURN NULL;
END $$;

CREATE TRIGGER members_raise_revision AFTER UPDATE OR DELETE ON members
FOR EACH ROW EXECUTE FUNCTION raise_project_revision();

-- The owner comes with the project itself: its first revision shows them already.
CREATE TRIGGER new_members_raise_revision AFTER INSERT ON members
FOR EACH ROW WHEN (NEW.role <> 'OWNER') EXECUTE FUNCTION raise_project_revision();

CREATE TRIGGER workspaces_raise_revision AFTER INSERT OR UPDATE OR DELETE ON workspaces
FOR EACH ROW EXECUTE FUNCTION raise_project_revision();

-- A member's name and avatar are shown in every project of theirs. Rows are locked in the order of their ids,
-- so that two renames at once cannot wait for each other.
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

-- What a project shows besides its own columns.
CREATE VIEW project_details AS
SELECT m.project_id,
       jsonb_build_object('id', u.id, 'email', u.email, 'name', u.name, 'avatar_url', u.avatar_url) AS owner,
       jsonb_build_object(
           'workspaces', (SELECT count(*) FROM workspaces w WHERE w.project_id = m.project_id),
           'collaborators', (SELECT count(*) FROM members c WHERE c.project_id = m.project_id)
       ) AS counts
FROM members m JOIN users u ON u.id = m.user_id WHERE m.role = 'OWNER';
