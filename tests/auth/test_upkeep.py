"""What is done in the background goes on, whatever happens."""

import asyncio

from structlog.testing import capture_logs

from server.auth.upkeep import Chore, keep_doing
from server.errors import Unavailable
from tests.patience import PATIENCE_SECONDS


async def test_a_chore_that_fails_is_done_again() -> None:
    failures = [Unavailable("away"), ZeroDivisionError(), OSError()]
    done = asyncio.Event()

    async def chore() -> None:
        if failures:
            raise failures.pop()
        done.set()

    task = asyncio.ensure_future(keep_doing(Chore("a test", chore, seconds=0.001)))
    async with asyncio.timeout(PATIENCE_SECONDS):
        await done.wait()
    assert not task.done()
    task.cancel()
    await asyncio.wait({task})


async def test_a_chore_that_is_put_off_again_and_again_is_logged_once() -> None:
    """Salts are erased every other second: a database that is away would fill the log."""
    done = asyncio.Event()
    times = 0

    async def chore() -> None:
        nonlocal times
        times += 1
        if times == 4:  # for a moment it is back
            return
        if times == 7:
            done.set()
        raise Unavailable("away")

    with capture_logs() as logs:
        task = asyncio.ensure_future(keep_doing(Chore("a test", chore, seconds=0.001)))
        async with asyncio.timeout(PATIENCE_SECONDS):
            await done.wait()
        task.cancel()
        await asyncio.wait({task})
    assert [log["event"] for log in logs] == ["chore put off"] * 2
