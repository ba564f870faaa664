DROP VIEW project_details;
DROP TRIGGER users_raise_revisions ON users;
DROP FUNCTION raise_revisions_of_member;
DROP TABLE workspaces;
DROP TRIGGER new_members_raise_revision ON members;
DROP TRIGGER members_raise_revision ON members;
DROP FUNCTION raise_project_revision;
