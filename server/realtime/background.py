"""Background tasks of the process: all sockets depend on them, and no caller sees their failures."""

import asyncio
from collections.abc import Awaitable, Callable

import structlog

log = structlog.get_logger()

RESTART_DELAY_SECONDS = 0.5


async def run_forever(task: Callable[[], Awaitable[None]]) -> None:
    """Run the task and restart it after each end; an unexpected error is logged and ends one run only."""
    while True:
        try:
            await task()
        except Exception:  # a transport of its own: no caller handles the error
            log.exception("background task failed", task=task.__qualname__)
        await asyncio.sleep(RESTART_DELAY_SECONDS)
