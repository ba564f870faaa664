-- Addresses are compared by a key (server/auth/addresses.py). lower() with the rules of the database's locale equates
-- look-alikes: it makes k of U+212A and i of U+0130.

-- A column that a trigger watches cannot be altered; the indexes would be built twice.
DROP TRIGGER users_raise_revisions ON users;
DROP INDEX users_email_key;
DROP INDEX invitations_email_key;
DROP INDEX invitations_email;

-- By this collation lower() changes ASCII letters only.
ALTER TABLE users
    ALTER COLUMN email TYPE text COLLATE "C",
    ADD COLUMN email_key text COLLATE "C" CHECK (length(email_key) <= 512);
ALTER TABLE invitations
    ALTER COLUMN email TYPE text COLLATE "C",
    ADD COLUMN email_key text COLLATE "C" CHECK (length(email_key) <= 512);

CREATE TRIGGER users_raise_revisions AFTER UPDATE OF name, avatar_url, email ON users
FOR EACH ROW WHEN ((OLD.name, OLD.avatar_url, OLD.email) IS DISTINCT FROM (NEW.name, NEW.avatar_url, NEW.email))
EXECUTE FUNCTION raise_revisions_of_member();

-- The key of an ASCII address. Other addresses need IDNA: `run.py migrate` gives them theirs afterwards, the oldest
-- first. Rewriting the table takes a third of the time of an update, and leaves no dead rows.
ALTER TABLE users ALTER COLUMN email_key TYPE text COLLATE "C"
USING CASE WHEN octet_length(email) = length(email) THEN lower(email) END;
ALTER TABLE invitations ALTER COLUMN email_key TYPE text COLLATE "C"
USING CASE WHEN octet_length(email) = length(email) THEN lower(email) END;

-- Those that may collide with such an address wait for it: they begin like it.
UPDATE users u SET email_key = NULL
WHERE octet_length(email) = length(email) AND EXISTS (
    SELECT FROM users other
    WHERE octet_length(other.email) > length(other.email)
      AND lower(split_part(other.email, '@', 1)) = lower(split_part(u.email, '@', 1))
);

CREATE UNIQUE INDEX users_email_key ON users (email_key);
-- No two accounts sign in by one spelling. Servers of the version before infer this index, and its like below.
CREATE UNIQUE INDEX users_email_spelling ON users (lower(email));
-- Of colliding accounts the oldest has the key. The others sign in by their exact spelling.
CREATE INDEX users_email_without_key ON users (email) WHERE email_key IS NULL;

-- New addresses are stored in their ASCII form: in lower case this is their key.
CREATE UNIQUE INDEX invitations_email_spelling ON invitations (project_id, lower(email));
CREATE INDEX invitations_email_key ON invitations (email_key);

-- For rows that are inserted without a key, by servers of the version before.
CREATE FUNCTION fill_email_key() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    NEW.email_key := lower(NEW.email);
    RETURN NEW;
END $$;

CREATE TRIGGER users_fill_email_key BEFORE INSERT ON users
FOR EACH ROW WHEN (NEW.email_key IS NULL AND octet_length(NEW.email) = length(NEW.email))
EXECUTE FUNCTION fill_email_key();

CREATE TRIGGER invitations_fill_email_key BEFORE INSERT ON invitations
FOR EACH ROW WHEN (NEW.email_key IS NULL AND octet_length(NEW.email) = length(NEW.email))
EXECUTE FUNCTION fill_email_key();
