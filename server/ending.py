"""Timeouts of a graceful shutdown: how long a supervisor, Docker and Kubernetes wait before they kill a process."""

from server.settings import Settings

KEEPALIVE_SECONDS = 12.0  # also the timeout for a request's headers: aiohttp has no other
CLOSE_SECONDS = 10.0
GRACE_SECONDS = 20  # for running attempts at shutdown; then the worker requeues them
HAND_BACK_SECONDS = 5


def server_seconds(settings: Settings) -> float:
    """Return how long a server takes to stop at most: sockets or idle connections, then requests, then the stores."""
    return max(settings.drain_seconds, KEEPALIVE_SECONDS) + settings.drain_seconds + CLOSE_SECONDS


def worker_seconds() -> float:
    """Return how long a worker takes to stop at most: running attempts, then requeueing the rest."""
    return GRACE_SECONDS + 3 * HAND_BACK_SECONDS
