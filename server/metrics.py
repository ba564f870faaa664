"""The Prometheus metrics; every package may update them, ``ops`` exposes them.

Under a supervisor each process writes to its own files (prometheus_client's multiprocess mode), and the process that
gets the scrape adds them up; hence every gauge names its aggregation. Counts of a killed process are kept.
"""

from typing import Final

from prometheus_client import Counter, Gauge, Histogram

LIVE: Final = "livesum"  # summed over the running processes
WAIT_BUCKETS = (0.01, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300, 900, 3600)
LAG_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5)

REQUEST_DURATION = Histogram(
    "http_request_duration_seconds", "Requests by route template", ["method", "route", "status"]
)
LIMITER_FALLBACKS = Counter(
    "rate_limiter_fallbacks_total", "Rate limit checks made locally while Redis was unavailable"
)
FORWARDED_MALFORMED = Counter(
    "forwarded_malformed_total", "Requests with an X-Forwarded-For entry that is not an address"
)
PROJECT_CACHE = Counter("project_cache_total", "Project lookups in a cache", ["cache", "outcome"])
SOCKETS = Gauge("websocket_connections", "Open sockets", multiprocess_mode=LIVE)
ROOMS = Gauge(
    "websocket_rooms", "Rooms per process, summed: a room counts once for each process", multiprocess_mode=LIVE
)
FRAMES_IN = Counter("websocket_frames_received_total", "Frames from clients")
FRAMES_OUT = Counter("websocket_frames_sent_total", "Frames to clients")
FRAMES_DROPPED = Counter(
    "websocket_frames_dropped_total", "Frames dropped by a full outbox (backpressure)", ["delivery"]
)
SOCKETS_CLOSED = Counter("websocket_closed_total", "Closed sockets by close code; 1006: closed by the peer", ["code"])
OUTBOX_FRAMES = Gauge("websocket_outbox_frames", "Frames queued for slow sockets", multiprocess_mode=LIVE)
OUTBOX_BYTES = Gauge("websocket_outbox_bytes", "Bytes queued for slow sockets", multiprocess_mode=LIVE)
PUBLISH_LAG = Histogram("redis_publish_lag_seconds", "Pub/sub latency of a probe message", buckets=LAG_BUCKETS)
JOBS_FINISHED = Counter("jobs_finished_total", "Job attempts by outcome", ["type", "outcome"])
JOB_WAIT = Histogram("job_wait_seconds", "Time between a job being due and its attempt", ["type"], buckets=WAIT_BUCKETS)
JOB_DURATION = Histogram("job_attempt_seconds", "Duration of job attempts", ["type"], buckets=WAIT_BUCKETS)
SANDBOX_RUNS = Counter("sandbox_runs_total", "Sandboxed programs by outcome", ["tier", "language", "outcome"])
DOCUMENTS_LOADED = Counter("documents_loaded_total", "Documents loaded into memory")
DOCUMENTS_OPEN = Gauge("documents_open", "Documents in memory", multiprocess_mode=LIVE)
DOCUMENT_COMMITS = Histogram("document_commit_seconds", "Duration of commits of document updates")
DOCUMENT_UPDATES = Counter("document_updates_total", "Document updates by outcome", ["outcome"])
STORE_UP = Gauge("store_up", "1 if every process can use the store, else 0", ["store"], multiprocess_mode="livemin")
POOL_CONNECTIONS = Gauge("postgres_pool_connections", "Pool connections by state", ["state"], multiprocess_mode=LIVE)
REPLICA_READS = Counter(
    "postgres_replica_reads_total", "Reads that may use a replica, by the store that answered", ["store"]
)
SANDBOX_LANGUAGES = Gauge(
    "sandbox_languages", "Languages that every worker can run", ["tier"], multiprocess_mode="livemin"
)
LOOP_LAG = Histogram("event_loop_lag_seconds", "Delay of a timer of the event loop", buckets=LAG_BUCKETS)

# rate() misses the first event of a new series, so these series exist from the start, with 0.
INITIALIZED_SERIES = (
    FRAMES_DROPPED.labels("ephemeral"),
    *map(DOCUMENT_UPDATES.labels, ("committed", "refused")),
    *map(REPLICA_READS.labels, ("replica", "primary")),
    *(PROJECT_CACHE.labels(cache, outcome) for cache in ("process", "redis") for outcome in ("hit", "miss")),
)
