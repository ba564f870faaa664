"""Prometheus counters that any room may bump; ``ops`` shows them."""

from prometheus_client import Counter, Gauge, Histogram

REQUESTS = Histogram("http_request_duration_seconds", "Requests by route template", ["method", "route", "status"])
LIMITER_FALLBACKS = Counter("rate_limiter_fallbacks_total", "Checks that a local limiter answered while Redis was away")
PROJECT_CACHE = Counter("project_cache_total", "Projects looked up in the cache", ["outcome"])
FRAMES_IN = Counter("websocket_frames_received_total", "Frames from clients")
FRAMES_OUT = Counter("websocket_frames_sent_total", "Frames to clients")
FRAMES_DROPPED = Counter("websocket_frames_dropped_total", "Frames that a full outbox dropped", ["delivery"])
SOCKETS_CLOSED = Counter("websocket_closed_total", "Sockets closed", ["code"])
JOBS_FINISHED = Counter("jobs_finished_total", "Job attempts by outcome", ["type", "outcome"])
DOCUMENTS_LOADED = Counter("documents_loaded_total", "Documents read into memory")
DOCUMENTS_OPEN = Gauge("documents_open", "Documents in memory")
DOCUMENT_COMMITS = Histogram("document_commit_seconds", "Commits of document updates")
DOCUMENT_UPDATES = Counter("document_updates_total", "Document updates by outcome", ["outcome"])
