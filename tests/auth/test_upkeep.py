"""What is done in the background goes on, whatever happens."""

import asyncio

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
