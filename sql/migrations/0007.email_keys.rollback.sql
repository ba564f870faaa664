DROP TRIGGER invitations_fill_email_key ON invitations;
DROP TRIGGER users_fill_email_key ON users;
DROP FUNCTION fill_email_key;
DROP TRIGGER users_raise_revisions ON users;
DROP INDEX invitations_email_spelling;
DROP INDEX users_email_spelling;

ALTER TABLE invitations DROP COLUMN email_key, ALTER COLUMN email TYPE text COLLATE "default";
ALTER TABLE users DROP COLUMN email_key, ALTER COLUMN email TYPE text COLLATE "default";

CREATE TRIGGER users_raise_revisions AFTER UPDATE OF name, avatar_url, email ON users
FOR EACH ROW WHEN ((OLD.name, OLD.avatar_url, OLD.email) IS DISTINCT FROM (NEW.name, NEW.avatar_url, NEW.email))
EXECUTE FUNCTION raise_revisions_of_member();
CREATE INDEX invitations_email ON invitations (lower(email));
CREATE UNIQUE INDEX invitations_email_key ON invitations (project_id, lower(email));
CREATE UNIQUE INDEX users_email_key ON users (lower(email));
