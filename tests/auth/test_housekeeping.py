"""Periodic tasks continue after every failure."""

import asyncio

from structlog.testing import capture_logs

from server.auth.housekeeping import PeriodicTask, run_periodically
from server.errors import Unavailable
from tests.timeouts import WAIT_TIMEOUT_SECONDS


async def test_failed_task_runs_again() -> None:
    failures = [Unavailable("away"), ZeroDivisionError(), OSError()]
    done = asyncio.Event()

    async def periodic_task() -> None:
        if failures:
            raise failures.pop()
        done.set()

    task = asyncio.ensure_future(run_periodically(PeriodicTask("a test", periodic_task, interval_seconds=0.001)))
    async with asyncio.timeout(WAIT_TIMEOUT_SECONDS):
        await done.wait()
    assert not task.done()
    task.cancel()
    await asyncio.wait({task})


async def test_repeatedly_deferred_task_is_logged_once() -> None:
    """Salts are erased every 2 s: an outage of the database would fill the log."""
    done = asyncio.Event()
    runs = 0

    async def periodic_task() -> None:
        nonlocal runs
        runs += 1
        if runs == 4:  # the database is back for a moment
            return
        if runs == 7:
            done.set()
        raise Unavailable("away")

    with capture_logs() as logs:
        task = asyncio.ensure_future(run_periodically(PeriodicTask("a test", periodic_task, interval_seconds=0.001)))
        async with asyncio.timeout(WAIT_TIMEOUT_SECONDS):
            await done.wait()
        task.cancel()
        await asyncio.wait({task})
    assert [log["event"] for log in logs] == ["periodic task deferred"] * 2
