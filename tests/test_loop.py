"""A process ends when it is told to, whatever the libraries in it have begun."""

import subprocess
import sys

from tests.patience import START_SECONDS

PROGRAM = """
import asyncio
from server import loop

loop.LAST_SECONDS = 1.0

async def stubborn(times):
    while times:
        try:
            await asyncio.sleep(600)
        except asyncio.CancelledError:
            times -= 1

async def main():
    asyncio.ensure_future(stubborn({times}))
    await asyncio.sleep(0)
    return "done"

print(loop.run(main()))
"""


def run(times: int) -> "subprocess.CompletedProcess[str]":
    program = [sys.executable, "-c", PROGRAM.format(times=times)]
    return subprocess.run(program, capture_output=True, text=True, timeout=START_SECONDS)


def test_a_task_that_swallows_a_cancellation_is_told_again() -> None:
    done = run(3)
    assert (done.returncode, done.stdout) == (0, "done\n"), done.stderr


def test_a_task_that_never_ends_does_not_keep_the_process() -> None:
    done = run(-1)
    assert done.returncode == 1
    assert "tasks do not end" in done.stdout
    assert "stubborn" in done.stdout
