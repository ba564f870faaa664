"""Documents: the files of a workspace, edited together.

Passes through: REST (``handlers``), the JSON socket (``messages``) and y-websocket clients (``yjs``), all over
the same live documents (``rooms``), whose only truth is the log in PostgreSQL (``store``): an update is
acknowledged, and heard by others, after its commit and never before. Only this room knows pycrdt.
"""
