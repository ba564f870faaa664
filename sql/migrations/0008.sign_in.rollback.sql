DROP TABLE known_networks;
DROP INDEX refresh_tokens_salted;
ALTER TABLE refresh_tokens DROP COLUMN salt, DROP COLUMN key_id;
