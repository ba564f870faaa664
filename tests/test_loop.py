"""A process ends after its main coroutine, even if libraries have started other tasks."""

import subprocess
import sys

from tests.timeouts import PROCESS_TIMEOUT_SECONDS

PROGRAM = """
import asyncio
from server import loop

loop.CANCEL_TIMEOUT_SECONDS = 1.0

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
    return subprocess.run(program, capture_output=True, text=True, timeout=PROCESS_TIMEOUT_SECONDS)


def test_task_that_swallows_a_cancellation_is_cancelled_again() -> None:
    completed = run(3)
    assert (completed.returncode, completed.stdout) == (0, "done\n"), completed.stderr


def test_task_that_never_ends_does_not_block_the_exit() -> None:
    completed = run(-1)
    assert completed.returncode == 1
    assert "tasks ignored cancellation" in completed.stdout
    assert "stubborn" in completed.stdout
