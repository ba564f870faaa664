ALTER TRIGGER "FIRST_workspaces_raise_revision" ON workspaces RENAME TO workspaces_raise_revision;
DROP TRIGGER workspaces_lock_documents ON workspaces;
DROP TRIGGER projects_lock_documents ON projects;
DROP FUNCTION lock_documents;
