"""How long a process takes to stop, at most: what a supervisor, Docker and Kubernetes wait before they kill it."""

from server.settings import Settings

KEEPALIVE_SECONDS = 12.0  # also what a client may take for its headers: aiohttp knows no other limit
CLOSE_SECONDS = 10.0
GRACE_SECONDS = 20  # for running attempts at the end; then they are handed back
HAND_BACK_SECONDS = 5


def server_seconds(settings: Settings) -> float:
    """Sockets or idle connections, then requests, then the stores."""
    return max(settings.drain_seconds, KEEPALIVE_SECONDS) + settings.drain_seconds + CLOSE_SECONDS


def worker_seconds() -> float:
    """Running attempts, then what is handed back."""
    return GRACE_SECONDS + 3 * HAND_BACK_SECONDS
