"""The event loop of a process, its garbage collection, and the reliable cancellation of its tasks."""

import asyncio
import gc
import os
import time
from collections.abc import Coroutine, Iterable
from typing import Any, TypeVar

import structlog
import uvloop

log = structlog.get_logger()

AGAIN_SECONDS = 0.2
LAST_SECONDS = 5.0
YOUNG_OBJECTS = 20_000
T = TypeVar("T")


def run(main: Coroutine[Any, Any, T]) -> T:
    """Run ``main``, then cancel all other tasks, also those of libraries; exit the process if some do not end."""
    gc.enable()  # it is off during imports
    return uvloop.run(_and_the_rest(main))


def settle() -> None:
    """Exclude the objects of the start from garbage collection, and collect less often; call once all are made.

    Reference counting frees nearly all objects of a request, and the default first generation of 700 objects is full
    after a few requests (measured: 8 % of the processor time of a server under load).
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(YOUNG_OBJECTS, *gc.get_threshold()[1:])


async def end(tasks: Iterable["asyncio.Future[Any]"], *, seconds: float | None = None) -> set["asyncio.Future[Any]"]:
    """Cancel tasks until they have ended; return those that have not within the timeout.

    One cancellation is not enough: a Redis client or a pool that is just connecting may swallow it.
    """
    pending = {task for task in tasks if not task.done()}
    deadline = None if seconds is None else time.monotonic() + seconds
    while pending and (deadline is None or time.monotonic() < deadline):
        for task in pending:
            task.cancel()
        _, pending = await asyncio.wait(pending, timeout=AGAIN_SECONDS)
    return pending


async def _and_the_rest(main: Coroutine[Any, Any, T]) -> T:
    try:
        return await main
    finally:
        rest = await end(asyncio.all_tasks() - {asyncio.current_task()}, seconds=LAST_SECONDS)
        if rest:
            # asyncio would wait for them forever.
            log.error("tasks do not end", tasks=[repr(task) for task in rest])
            os._exit(1)
