"""Whether a process lives: what liveness probes ask of servers and workers. It asks no store: a restart heals none."""

import time
from typing import Any

from server import __version__


def alive(*, since: float) -> dict[str, Any]:
    """Return what the process says of itself; ``since`` is the monotonic time of its start."""
    return {"status": "ok", "uptime": round(time.monotonic() - since, 3), "version": __version__}
