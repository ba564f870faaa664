DROP TABLE idempotency_keys;
DROP TRIGGER renamed_documents_claim_path ON documents;
DROP TRIGGER documents_claim_path ON documents;
DROP FUNCTION claim_path;
