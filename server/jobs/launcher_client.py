"""The client of the sandbox launcher, in the worker: starts a program, captures its output, cancels it."""

import asyncio
import codecs
import fcntl
import json
import os
import shutil
import socket
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import structlog

from server import child

log = structlog.get_logger()

LAUNCHER = Path(__file__).parent / "launcher.py"
MAX_STREAM_BYTES = 1 << 20
READ_CHUNK_BYTES = 64 << 10
DISCARD_DELAY_SECONDS = 0.001
STOP_TIMEOUT_SECONDS = 2.0
STDERR_DESCRIPTOR = 2

OnOutput = Callable[[str, int, str], None]
"""Called with the stream's name, the offset in characters and the text."""


class SandboxError(Exception):
    """The program cannot be confined, so nothing ran."""


class NotLaunchedError(Exception):
    """The launcher has exited before it started the program; another launcher may run it."""


class StreamCapture:
    """The capture of one stream: keeps the first MiB, reads and discards the rest."""

    def __init__(self, stream: str, on_output: OnOutput) -> None:
        self.truncated = False
        self._stream, self._on_output = stream, on_output
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._remaining_bytes = MAX_STREAM_BYTES
        self._parts: list[str] = []
        self._offset = 0

    @property
    def text(self) -> str:
        return "".join(self._parts)

    async def read(self, reader: asyncio.StreamReader) -> None:
        while chunk := await reader.read(READ_CHUNK_BYTES):
            kept = chunk[: self._remaining_bytes]
            self._remaining_bytes -= len(kept)
            self.truncated = self.truncated or len(kept) < len(chunk)
            if self.truncated:
                await asyncio.sleep(DISCARD_DELAY_SECONDS)  # else discarding would use the whole CPU
            self.append(self._decoder.decode(kept))
        self.append(self._decoder.decode(b"", final=True))

    def append(self, text: str) -> None:
        if text:
            self._parts.append(text)
            self._on_output(self._stream, self._offset, text)
            self._offset += len(text)


class LauncherProcess:
    """The process that forks a shim per program, and the directory that holds the directories of jobs."""

    def __init__(self, process: asyncio.subprocess.Process, control: socket.socket, directory: Path) -> None:
        self._process, self._control = process, control
        self._accepts_programs = True
        self.directory = directory

    @classmethod
    async def start(cls) -> "LauncherProcess":
        directory = Path(tempfile.mkdtemp(prefix="sandbox-"))
        os.chmod(directory, 0o711)  # noqa: PTH101, S103 - the users of jobs must traverse it; chmod is fast
        lock = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
        fcntl.flock(lock, fcntl.LOCK_EX)
        local, remote = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        local.setblocking(False)
        try:
            process = await child.spawn_process(
                *(sys.executable, "-I", "-S", str(LAUNCHER), str(remote.fileno()), str(lock), str(directory)),
                stderr=STDERR_DESCRIPTOR,  # for the launcher's own errors; it closes this descriptor in its children
                inherit=[remote.fileno(), lock],
                cwd="/",
                environment={},  # else other processes could read it in /proc/…/environ
            )
        except BaseException:
            local.close()
            shutil.rmtree(directory, ignore_errors=True)
            raise
        finally:
            remote.close()
            os.close(lock)
        return cls(process, local, directory)

    @property
    def alive(self) -> bool:
        return self._accepts_programs and self._process.returncode is None

    def launch(self, config: Path, descriptors: list[int]) -> None:
        """Send a program to the launcher.

        Raises:
            NotLaunchedError: the launcher has exited.
            SandboxError: the launcher does not accept the message.
        """
        try:
            socket.send_fds(self._control, [str(config).encode()], descriptors)
        except ConnectionError as error:  # the launcher has exited; asyncio notices it a moment later
            self._accepts_programs = False
            raise NotLaunchedError(str(error)) from error
        except OSError as error:
            raise SandboxError(f"the sandbox launcher does not accept programs: {error}") from error

    async def close(self) -> None:
        """Close the control socket: the launcher waits for its shims, removes the directory and exits."""
        self._control.close()
        try:
            async with asyncio.timeout(STOP_TIMEOUT_SECONDS):
                await self._process.wait()
        except TimeoutError:
            log.warning("sandbox launcher did not exit in time")


class RunningProgram:
    """A running program: its output and the channel to its shim. Closing the channel ends the program."""

    def __init__(self, root: Path, on_output: OnOutput) -> None:
        self.stdout, self.stderr = StreamCapture("stdout", on_output), StreamCapture("stderr", on_output)
        self._config = root / "config.json"
        self._capture_tasks: list[asyncio.Task[None]] = []
        self._pipes: list[asyncio.BaseTransport] = []

    async def start(self, launcher: LauncherProcess) -> None:
        self._channel, shim_channel = socket.socketpair()
        self._channel.setblocking(False)
        write_ends: list[int] = []
        try:
            for output in (self.stdout, self.stderr):
                read_end, write_end = os.pipe()
                write_ends.append(write_end)
                await self._capture(output, read_end)
            launcher.launch(self._config, [*write_ends, shim_channel.fileno()])
        except BaseException:
            self._close()
            raise
        finally:
            shim_channel.close()
            for descriptor in write_ends:
                os.close(descriptor)

    async def _capture(self, output: StreamCapture, descriptor: int) -> None:
        reader = asyncio.StreamReader()
        pipe, _ = await asyncio.get_running_loop().connect_read_pipe(
            lambda: asyncio.StreamReaderProtocol(reader), os.fdopen(descriptor, "rb", 0)
        )
        self._pipes.append(pipe)
        self._capture_tasks.append(asyncio.create_task(output.read(reader)))

    async def wait(self) -> dict[str, Any]:
        """Wait for the outcome that the shim reports.

        The shim first sends an empty line to confirm its start. When it exits, no process that could write is left, so
        the output ends too.
        """
        try:
            raw = await self._read_outcome()
            await asyncio.wait(self._capture_tasks, timeout=STOP_TIMEOUT_SECONDS)
        except BaseException:
            await self._cancel()
            raise
        finally:
            self._close()
        if not raw:
            raise NotLaunchedError("the sandbox launcher was killed")
        if not raw.strip():
            raise SandboxError("the program's shim was killed")
        outcome: dict[str, Any] = json.loads(raw)
        if "error" in outcome:
            raise SandboxError(f"{outcome['error']} {self.stderr.text[-200:]}".strip())
        return outcome

    async def _read_outcome(self) -> bytes:
        raw = b""
        while part := await asyncio.get_running_loop().sock_recv(self._channel, READ_CHUNK_BYTES):
            raw += part
        return raw

    async def _cancel(self) -> None:
        """Shut the channel down: the shim kills all its descendants, removes the directory and exits."""
        self._channel.shutdown(socket.SHUT_WR)
        try:
            async with asyncio.timeout(STOP_TIMEOUT_SECONDS):
                await self._read_outcome()
        except (TimeoutError, ConnectionError):
            log.warning("cancelled program did not exit in time")

    def _close(self) -> None:
        for task in self._capture_tasks:
            task.cancel()
        for pipe in self._pipes:
            pipe.close()
        self._channel.close()
