"""The context that a job type's function receives besides its payload."""

import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any

from server.jobs.output import OutputWriter
from server.jobs.sandbox import Sandbox
from server.jobs.workspace_files import WorkspaceFiles
from server.resources import Resources

PROGRESS_INTERVAL_SECONDS = 0.5


@dataclass
class AttemptContext:
    """The context of one attempt.

    The function only reads the record; the lifecycle writes the outcome.
    """

    record: dict[str, Any]
    stores: Resources
    sandbox: Sandbox
    output: OutputWriter
    files: WorkspaceFiles
    write_progress: Callable[[float], Awaitable[None]]
    _reported_at: float = field(default=0.0, init=False)

    async def report_progress(self, percent: float) -> None:
        """Report progress, 0–100. Calls that come too soon after the last report have no effect."""
        if time.monotonic() - self._reported_at >= PROGRESS_INTERVAL_SECONDS:
            self._reported_at = time.monotonic()
            await self.write_progress(round(min(percent, 100.0), 1))
