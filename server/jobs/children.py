"""Programs of ours that do heavy work in a process of their own, which can be killed at any moment."""

import asyncio
import contextlib
import os
import signal
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path

from server import child
from server.errors import TooLarge

MOST_ANSWER_BYTES = 8 << 20

OnProgress = Callable[[float], Awaitable[None]]


async def run(program: Path, *arguments: str, cwd: Path, progress: OnProgress) -> bytes:
    """What the program answers: ``program PARENT ARGUMENTS``, whose last line is the answer; each before tells how far
    it is, 0–100. Cancelling the call kills it.

    Raises:
        ChildError: it failed.
        TooLarge: it prints more than an answer may have.
    """
    process = await child.spawn(
        sys.executable,
        "-I",
        str(program),
        str(os.getpid()),
        *arguments,
        stdout=asyncio.subprocess.PIPE,
        cwd=cwd,
        environment={},  # nothing of ours
        limit=MOST_ANSWER_BYTES,
    )
    assert process.stdout is not None
    try:
        answer = b""
        while line := await _line(process.stdout):
            if answer:
                await progress(float(answer))
            answer = line
        code = await process.wait()
    finally:
        if process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            await asyncio.shield(process.wait())
    if code != 0:
        raise ChildError(f"{program.stem} ended with {code}")
    return answer


async def _line(reader: asyncio.StreamReader) -> bytes:
    try:
        return await reader.readline()
    except ValueError as error:
        raise TooLarge("The answer is too large") from error


class ChildError(Exception):
    """The program failed, or hit a limit."""
