-- What grows has a bound, and what a project shows of its members is never older than its revision.

-- A user as others see them; null for nobody.
CREATE FUNCTION person(u users) RETURNS jsonb LANGUAGE sql STABLE AS $$
SELECT CASE WHEN u.id IS NOT NULL THEN
    jsonb_build_object('id', u.id, 'email', u.email, 'name', u.name, 'avatar_url', u.avatar_url) END
$$;

-- Who joins must not change their name meanwhile: that change would not know of this project, and its revision would
-- show the old name. Before the project is locked, since a change of name locks the user first, too.
CREATE FUNCTION hold_new_member() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    PERFORM FROM users WHERE id = NEW.user_id FOR SHARE;
    RETURN NEW;
END $$;

CREATE TRIGGER members_hold_user BEFORE INSERT ON members
FOR EACH ROW EXECUTE FUNCTION hold_new_member();

-- About the newest 10,000 entries of a project stay. One entry in a hundred takes older ones with it, never many.
CREATE FUNCTION shorten_activity() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    DELETE FROM activity WHERE id IN (
        SELECT id FROM activity WHERE project_id = NEW.project_id AND id <= (
            SELECT id FROM activity WHERE project_id = NEW.project_id ORDER BY id DESC OFFSET 10000 LIMIT 1)
        ORDER BY id LIMIT 1000 FOR UPDATE SKIP LOCKED);
    RETURN NULL;
END $$;

CREATE TRIGGER activity_shorten AFTER INSERT ON activity
FOR EACH ROW WHEN (NEW.id % 100 = 0) EXECUTE FUNCTION shorten_activity();

-- To delete a user would else be to look through all that anybody did: who is gone is shown as nobody.
ALTER TABLE activity DROP CONSTRAINT activity_actor_id_fkey;
ALTER TABLE invitations DROP CONSTRAINT invitations_invited_by_fkey;

-- For the housekeeping, and for the notes of what has just ended.
CREATE INDEX invitations_expires_at ON invitations (expires_at);
CREATE INDEX sessions_ended_at ON sessions (ended_at) WHERE ended_at IS NOT NULL;
