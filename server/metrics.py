"""What Prometheus is told; any room may bump these, ``ops`` shows them.

Under a supervisor each process writes to files of its own (prometheus_client's multiprocess mode), and whichever
is asked adds them up; hence every gauge says how it adds up. What a killed process counted stays counted.
"""

from typing import Final

from prometheus_client import Counter, Gauge, Histogram

LIVE: Final = "livesum"  # summed over the processes that live
WAITS = (0.01, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300, 900, 3600)
LAGS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5)

REQUESTS = Histogram("http_request_duration_seconds", "Requests by route template", ["method", "route", "status"])
LIMITER_FALLBACKS = Counter("rate_limiter_fallbacks_total", "Checks that a local limiter answered while Redis was away")
FORWARDED_MALFORMED = Counter("forwarded_malformed_total", "Requests whose X-Forwarded-For entry is no address")
PROJECT_CACHE = Counter("project_cache_total", "Projects looked up in a cache", ["cache", "outcome"])
SOCKETS = Gauge("websocket_connections", "Sockets open", multiprocess_mode=LIVE)
ROOMS = Gauge("websocket_rooms", "Rooms, of each process: one may count in several", multiprocess_mode=LIVE)
FRAMES_IN = Counter("websocket_frames_received_total", "Frames from clients")
FRAMES_OUT = Counter("websocket_frames_sent_total", "Frames to clients")
FRAMES_DROPPED = Counter("websocket_frames_dropped_total", "Frames that a full outbox dropped", ["delivery"])
SOCKETS_CLOSED = Counter("websocket_closed_total", "Sockets closed, by code; 1006: by the peer", ["code"])
OUTBOX_FRAMES = Gauge("websocket_outbox_frames", "Frames that wait for slow sockets", multiprocess_mode=LIVE)
OUTBOX_BYTES = Gauge("websocket_outbox_bytes", "Bytes that wait for slow sockets", multiprocess_mode=LIVE)
PUBLISH_LAG = Histogram("redis_publish_lag_seconds", "From publishing to hearing it, probed", buckets=LAGS)
JOBS_FINISHED = Counter("jobs_finished_total", "Job attempts by outcome", ["type", "outcome"])
JOB_WAIT = Histogram("job_wait_seconds", "From when a job was due to its attempt", ["type"], buckets=WAITS)
JOB_DURATION = Histogram("job_attempt_seconds", "Attempts of jobs", ["type"], buckets=WAITS)
SANDBOX_RUNS = Counter("sandbox_runs_total", "Programs run by how they ended", ["tier", "language", "outcome"])
DOCUMENTS_LOADED = Counter("documents_loaded_total", "Documents read into memory")
DOCUMENTS_OPEN = Gauge("documents_open", "Documents in memory", multiprocess_mode=LIVE)
DOCUMENT_COMMITS = Histogram("document_commit_seconds", "Commits of document updates")
DOCUMENT_UPDATES = Counter("document_updates_total", "Document updates by outcome", ["outcome"])
STORE_UP = Gauge("store_up", "1 where every process can use the store", ["store"], multiprocess_mode="livemin")
POOL_CONNECTIONS = Gauge("postgres_pool_connections", "Connections by state", ["state"], multiprocess_mode=LIVE)
REPLICA_READS = Counter("postgres_replica_reads_total", "Reads meant for a replica, by who answered", ["store"])
SANDBOX_LANGUAGES = Gauge(
    "sandbox_languages", "Languages that every worker can run", ["tier"], multiprocess_mode="livemin"
)
LOOP_LAG = Histogram("event_loop_lag_seconds", "How late a sleeping task is woken", buckets=LAGS)

# A rate misses the first event of a series that was not there before: these are, from 0.
FROM_ZERO = (
    FRAMES_DROPPED.labels("ephemeral"),
    *map(DOCUMENT_UPDATES.labels, ("committed", "refused")),
    *map(REPLICA_READS.labels, ("replica", "primary")),
    *(PROJECT_CACHE.labels(cache, outcome) for cache in ("process", "redis") for outcome in ("hit", "miss")),
)
