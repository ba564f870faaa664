"""Liveness of servers and workers. It asks no store, because restarting the process does not repair a store."""

import time
from typing import Any

from server import __version__


def liveness(*, started_at: float) -> dict[str, Any]:
    """Return status, uptime and version; ``started_at`` is the monotonic time of the start."""
    return {"status": "ok", "uptime": round(time.monotonic() - started_at, 3), "version": __version__}
