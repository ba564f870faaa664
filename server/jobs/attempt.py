"""What the function of a job type is given besides its payload."""

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
    """One attempt of one job. The record is for reading: what comes of it is written for the function."""

    record: dict[str, Any]
    stores: Resources
    sandbox: Sandbox
    output: Output
    files: Files
    tell_progress: Callable[[float], Awaitable[None]]
    _told: float = field(default=0.0, init=False)

    async def progress(self, percent: float) -> None:
        """How far it is, 0–100. May be called as often as one likes."""
        if time.monotonic() - self._told >= REPORT_SECONDS:
            self._told = time.monotonic()
            await self.tell_progress(round(min(percent, 100.0), 1))
