"""Timeouts of a graceful shutdown: how long a supervisor, Docker and Kubernetes wait before they kill a process."""

from server.settings import Settings

KEEPALIVE_TIMEOUT_SECONDS = 12.0  # also the timeout for a request's headers: aiohttp has no other
STORES_CLOSE_TIMEOUT_SECONDS = 10.0
JOB_GRACE_SECONDS = 20  # for running attempts at shutdown; then the worker requeues them
REQUEUE_TIMEOUT_SECONDS = 5


def server_stop_timeout(settings: Settings) -> float:
    """Return how long a server takes to stop at most: sockets or idle connections, then requests, then the stores."""
    return (
        max(settings.drain_seconds, KEEPALIVE_TIMEOUT_SECONDS) + settings.drain_seconds + STORES_CLOSE_TIMEOUT_SECONDS
    )


def worker_stop_timeout() -> float:
    """Return how long a worker takes to stop at most: running attempts, then requeueing the rest."""
    return JOB_GRACE_SECONDS + 3 * REQUEUE_TIMEOUT_SECONDS
