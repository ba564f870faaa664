DROP TABLE document_versions;
DROP TABLE document_snapshots;
DROP TABLE document_updates;
DROP TABLE documents;
