-- A refresh token's successor is computed from it, a salt and a key: one token has one successor, however often it is
-- used at once. Without the salt, which is erased after seconds, an old token and the key do not give it away.
ALTER TABLE refresh_tokens
    ADD COLUMN salt   bytea,
    ADD COLUMN key_id text;

CREATE INDEX refresh_tokens_salted ON refresh_tokens (spent_at) WHERE salt IS NOT NULL;

-- The networks (an IPv4 address, an IPv6 /64) from which an account was signed in to: guesses from elsewhere do not
-- lock its owner out there.
CREATE TABLE known_networks (
    user_id         uuid NOT NULL REFERENCES users ON DELETE CASCADE,
    network         cidr NOT NULL,
    last_sign_in_at timestamptz NOT NULL DEFAULT now(),
    PRIMARY KEY (user_id, network)
);

CREATE INDEX known_networks_last_sign_in_at ON known_networks (last_sign_in_at);

INSERT INTO known_networks (user_id, network, last_sign_in_at)
SELECT s.user_id, known.network, max(s.created_at)
FROM sessions s, LATERAL (
    SELECT CASE
        WHEN s.ip ~ '^\d{1,3}(\.\d{1,3}){3}$' THEN network(s.ip::inet)
        WHEN s.ip ~* '^[0-9a-f:]*:[0-9a-f:]*$' THEN network(set_masklen(s.ip::inet, 64))
    END AS network
) AS known
WHERE s.created_at > now() - interval '30 days' AND known.network IS NOT NULL
GROUP BY s.user_id, known.network;
