"""Background tasks of the process that all sockets depend on: each restarts after a failure."""

import asyncio
from collections.abc import Awaitable, Callable

import structlog

log = structlog.get_logger()

RESTART_DELAY_SECONDS = 0.5


async def run_forever(task: Callable[[], Awaitable[None]]) -> None:
    """Run the task again and again, until cancelled; an unexpected error is logged and ends one run only."""
    while True:
        try:
            await task()
        except Exception:  # the outermost frame of the task: no caller handles the error
            log.exception("background task failed", task=task.__qualname__)
        await asyncio.sleep(RESTART_DELAY_SECONDS)
