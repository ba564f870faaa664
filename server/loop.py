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

CANCEL_RETRY_INTERVAL_SECONDS = 0.2
CANCEL_TIMEOUT_SECONDS = 5.0
GC_YOUNG_THRESHOLD = 20_000
T = TypeVar("T")


def run(main: Coroutine[Any, Any, T]) -> T:
    """Run ``main``, then cancel all other tasks, also those of libraries; exit the process if some do not end."""
    gc.enable()  # it is off during imports
    return uvloop.run(_run_then_cancel_rest(main))


def tune_gc() -> None:
    """Exclude the objects of the start from garbage collection, and collect less often; call once all are made.

    Reference counting frees nearly all objects of a request, and the default first generation of 700 objects is full
    after a few requests (measured: 8 % of the processor time of a server under load).
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(GC_YOUNG_THRESHOLD, *gc.get_threshold()[1:])


async def cancel_tasks(
    tasks: Iterable["asyncio.Future[Any]"], *, timeout: float | None = None
) -> set["asyncio.Future[Any]"]:
    """Cancel tasks until they have ended; return those that have not within the timeout.

    One cancellation is not enough: a Redis client or a pool that is just connecting may swallow it.
    """
    pending = {task for task in tasks if not task.done()}
    deadline = None if timeout is None else time.monotonic() + timeout
    while pending and (deadline is None or time.monotonic() < deadline):
        for task in pending:
            task.cancel()
        _, pending = await asyncio.wait(pending, timeout=CANCEL_RETRY_INTERVAL_SECONDS)
    return pending


async def _run_then_cancel_rest(main: Coroutine[Any, Any, T]) -> T:
    try:
        return await main
    finally:
        rest = await cancel_tasks(asyncio.all_tasks() - {asyncio.current_task()}, timeout=CANCEL_TIMEOUT_SECONDS)
        if rest:
            # asyncio would wait for them forever.
            log.error("tasks ignored cancellation", tasks=[repr(task) for task in rest])
            os._exit(1)
