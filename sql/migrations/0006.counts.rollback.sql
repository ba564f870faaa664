DROP VIEW project_details;
DROP FUNCTION shown_person;
DROP FUNCTION shown_counts;

CREATE VIEW project_details AS
SELECT m.project_id,
       jsonb_build_object('id', u.id, 'email', u.email, 'name', u.name, 'avatar_url', u.avatar_url) AS owner,
       jsonb_build_object(
           'workspaces', (SELECT count(*) FROM workspaces w WHERE w.project_id = m.project_id),
           'collaborators', (SELECT count(*) FROM members c WHERE c.project_id = m.project_id)
       ) AS counts
FROM members m JOIN users u ON u.id = m.user_id WHERE m.role = 'OWNER';

CREATE OR REPLACE FUNCTION raise_project_revision() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    UPDATE projects SET revision = revision + 1 WHERE id = COALESCE(NEW.project_id, OLD.project_id);
    RETURN NULL;
END $$;

ALTER TABLE projects DROP COLUMN workspace_count, DROP COLUMN member_count;
