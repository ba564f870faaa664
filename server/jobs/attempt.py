"""The context that a job type's function receives besides its payload."""

import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any

from server.jobs.files import Files
from server.jobs.output import Output
from server.jobs.sandbox import Sandbox
from server.resources import Resources

REPORT_SECONDS = 0.5


@dataclass
class Attempt:
    """The context of one attempt.

    The function only reads the record; the lifecycle writes the outcome.
    """

    record: dict[str, Any]
    stores: Resources
    sandbox: Sandbox
    output: Output
    files: Files
    tell_progress: Callable[[float], Awaitable[None]]
    _told: float = field(default=0.0, init=False)

    async def progress(self, percent: float) -> None:
        """Report progress, 0–100. Calls that come too soon after the last report have no effect."""
        if time.monotonic() - self._told >= REPORT_SECONDS:
            self._told = time.monotonic()
            await self.tell_progress(round(min(percent, 100.0), 1))
