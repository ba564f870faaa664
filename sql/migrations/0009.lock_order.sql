-- A commit of live edits locks documents of any projects in the order of their ids, and no project. So what deletes
-- several documents locks them in that order, too, before the cascade reaches them in another. The query of a trigger
-- sees what was committed while its row was waited for.
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

-- Triggers fire in the order of their names: this one before the check of the foreign key ("RI_…"), which would lock
-- the project more weakly. Two that raise such a lock, and a deletion that waits for both, wait for each other.
ALTER TRIGGER workspaces_raise_revision ON workspaces RENAME TO "FIRST_workspaces_raise_revision";
