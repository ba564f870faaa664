"""Tasks that run as long as the process: everybody depends on them, and nobody stands behind them."""

import asyncio
from collections.abc import Awaitable, Callable

import structlog

log = structlog.get_logger()

RESTART_SECONDS = 0.5


async def keep_running(endless: Callable[[], Awaitable[None]]) -> None:
    """What was not foreseen ends one round, never the task."""
    while True:
        try:
            await endless()
        except Exception:  # a door of its own
            log.exception("an endless task failed", task=endless.__qualname__)
        await asyncio.sleep(RESTART_SECONDS)
