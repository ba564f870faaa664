"""Helper processes: the server's own programs for heavy work, which can be killed at any moment."""

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
    """Run ``program PARENT ARGUMENTS`` and return the last line that it prints.

    Each earlier line is its progress, 0–100. Cancelling the call kills the process.

    Raises:
        HelperProcessError: the program failed.
        TooLarge: a line exceeds the maximum size.
    """
    process = await child.spawn(
        sys.executable,
        "-I",
        str(program),
        str(os.getpid()),
        *arguments,
        stdout=asyncio.subprocess.PIPE,
        cwd=cwd,
        environment={},  # none of the worker's variables
        limit=MOST_ANSWER_BYTES,
    )
    assert process.stdout is not None
    try:
        last_line = b""
        while line := await _line(process.stdout):
            if last_line:
                await progress(float(last_line))
            last_line = line
        code = await process.wait()
    finally:
        if process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            await asyncio.shield(process.wait())
    if code != 0:
        raise ChildError(f"{program.stem} exited with status {code}")
    return last_line


async def _line(reader: asyncio.StreamReader) -> bytes:
    try:
        return await reader.readline()
    except ValueError as error:
        raise TooLarge(f"Result exceeds the maximum size of {MOST_ANSWER_BYTES >> 20} MiB") from error


class ChildError(Exception):
    """The helper process failed, or exceeded a limit."""
