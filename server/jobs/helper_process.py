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

MAX_LINE_BYTES = 8 << 20

OnProgress = Callable[[float], Awaitable[None]]


async def run(program: Path, *arguments: str, cwd: Path, on_progress: OnProgress) -> bytes:
    """Run ``program PARENT ARGUMENTS`` and return the last line that it prints.

    Each earlier line is its progress, 0–100. Cancelling the call kills the process.

    Raises:
        HelperProcessError: the program failed.
        TooLarge: a line exceeds the maximum size.
    """
    process = await child.spawn_process(
        sys.executable,
        "-I",
        str(program),
        str(os.getpid()),
        *arguments,
        stdout=asyncio.subprocess.PIPE,
        cwd=cwd,
        environment={},  # none of the worker's variables
        limit=MAX_LINE_BYTES,
    )
    assert process.stdout is not None
    try:
        last_line = b""
        while line := await _read_line(process.stdout):
            if last_line:
                await on_progress(float(last_line))
            last_line = line
        code = await process.wait()
    finally:
        if process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            await asyncio.shield(process.wait())
    if code != 0:
        raise HelperProcessError(f"{program.stem} exited with status {code}")
    return last_line


async def _read_line(reader: asyncio.StreamReader) -> bytes:
    try:
        return await reader.readline()
    except ValueError as error:
        raise TooLarge(f"Result exceeds the maximum size of {MAX_LINE_BYTES >> 20} MiB") from error


class HelperProcessError(Exception):
    """The helper process failed, or exceeded a limit."""
