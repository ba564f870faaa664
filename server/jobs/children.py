"""Programs of ours that do heavy work in a process of their own, which can be killed at any moment."""

import asyncio
import contextlib
import os
import shutil
import signal
import sys
import tempfile
from collections.abc import AsyncIterator
from pathlib import Path

from server.errors import TooLarge

MOST_ANSWER_BYTES = 8 << 20
CHUNK = 64 << 10


@contextlib.asynccontextmanager
async def folder() -> AsyncIterator[Path]:
    """A fresh directory, removed afterwards."""
    made = Path(await asyncio.to_thread(tempfile.mkdtemp, prefix="child-"))
    try:
        yield made
    finally:
        await asyncio.to_thread(shutil.rmtree, made, ignore_errors=True)


async def run(program: Path, *arguments: str, cwd: Path) -> bytes:
    """What the program prints: ``program PARENT ARGUMENTS``. Cancelling the call kills it.

    Raises:
        ChildError: it failed.
        TooLarge: it prints more than an answer may have.
    """
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-I",
        str(program),
        str(os.getpid()),
        *arguments,
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.DEVNULL,
        cwd=cwd,
        env={},  # nothing of ours
        start_new_session=True,
    )
    assert process.stdout is not None
    try:
        told = bytearray()
        while chunk := await process.stdout.read(CHUNK):
            told += chunk
            if len(told) > MOST_ANSWER_BYTES:
                raise TooLarge("The answer is too large")
        code = await process.wait()
    finally:
        if process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            await asyncio.shield(process.wait())
    if code != 0:
        raise ChildError(f"{program.stem} ended with {code}")
    return bytes(told)


class ChildError(Exception):
    """The program failed, or hit a limit."""
