"""The launcher and its shims, from the worker's side: one program's start, output, outcome and early end."""

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
OUTPUT_BYTES = 1 << 20
CHUNK = 64 << 10
DROPPING_PAUSE = 0.001
STOP_SECONDS = 2.0
STDERR = 2

OnOutput = Callable[[str, int, str], None]
"""Called with the stream's name, the offset in characters and the text."""


class SandboxError(Exception):
    """The program could not be confined, so nothing ran."""


class NotLaunchedError(Exception):
    """The launcher has ended; another may run it."""


class Output:
    """One stream: the first MiB is kept, the rest is read and dropped."""

    def __init__(self, stream: str, on_output: OnOutput) -> None:
        self.truncated = False
        self._stream, self._on_output = stream, on_output
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._left = OUTPUT_BYTES
        self._parts: list[str] = []
        self._offset = 0

    @property
    def text(self) -> str:
        return "".join(self._parts)

    async def read(self, reader: asyncio.StreamReader) -> None:
        while chunk := await reader.read(CHUNK):
            kept = chunk[: self._left]
            self._left -= len(kept)
            self.truncated = self.truncated or len(kept) < len(chunk)
            if self.truncated:
                await asyncio.sleep(DROPPING_PAUSE)  # or what nobody will see would take all of our time
            self.take(self._decoder.decode(kept))
        self.take(self._decoder.decode(b"", final=True))

    def take(self, text: str) -> None:
        if text:
            self._parts.append(text)
            self._on_output(self._stream, self._offset, text)
            self._offset += len(text)


class Launcher:
    """The process that forks a shim for each program, and the directory in which jobs have theirs."""

    def __init__(self, process: asyncio.subprocess.Process, control: socket.socket, directory: Path) -> None:
        self._process, self._control = process, control
        self._listens = True
        self.directory = directory

    @classmethod
    async def start(cls) -> "Launcher":
        directory = Path(tempfile.mkdtemp(prefix="sandbox-"))
        os.chmod(directory, 0o711)  # noqa: PTH101, S103 - jobs' users must get through; it takes no time
        lock = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
        fcntl.flock(lock, fcntl.LOCK_EX)
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        ours.setblocking(False)
        try:
            process = await child.spawn(
                *(sys.executable, "-I", "-S", str(LAUNCHER), str(theirs.fileno()), str(lock), str(directory)),
                stderr=STDERR,  # the launcher's own errors; it closes ours for what it forks
                inherit=[theirs.fileno(), lock],
                cwd="/",
                environment={},  # nothing of ours in anybody's /proc/…/environ
            )
        except BaseException:
            ours.close()
            shutil.rmtree(directory, ignore_errors=True)
            raise
        finally:
            theirs.close()
            os.close(lock)
        return cls(process, ours, directory)

    @property
    def alive(self) -> bool:
        return self._listens and self._process.returncode is None

    def launch(self, config: Path, descriptors: list[int]) -> None:
        try:
            socket.send_fds(self._control, [str(config).encode()], descriptors)
        except ConnectionError as error:  # it has ended, which asyncio will know in a moment
            self._listens = False
            raise NotLaunchedError(str(error)) from error
        except OSError as error:
            raise SandboxError(f"the launcher does not listen: {error}") from error

    async def close(self) -> None:
        """Its shims end their programs when their channels close; it waits for them and clears up."""
        self._control.close()
        try:
            async with asyncio.timeout(STOP_SECONDS):
                await self._process.wait()
        except TimeoutError:
            log.warning("the launcher takes its time to end")


class Job:
    """One program, from here: its output and the channel to its shim. Closing the channel ends the program."""

    def __init__(self, root: Path, on_output: OnOutput) -> None:
        self.stdout, self.stderr = Output("stdout", on_output), Output("stderr", on_output)
        self._config = root / "config.json"
        self._reading: list[asyncio.Task[None]] = []
        self._pipes: list[asyncio.BaseTransport] = []

    async def start(self, launcher: Launcher) -> None:
        self._channel, told = socket.socketpair()
        self._channel.setblocking(False)
        theirs: list[int] = []
        try:
            for output in (self.stdout, self.stderr):
                ours, descriptor = os.pipe()
                theirs.append(descriptor)
                await self._listen(output, ours)
            launcher.launch(self._config, [*theirs, told.fileno()])
        except BaseException:
            self._close()
            raise
        finally:
            told.close()
            for descriptor in theirs:
                os.close(descriptor)

    async def _listen(self, output: Output, descriptor: int) -> None:
        reader = asyncio.StreamReader()
        pipe, _ = await asyncio.get_running_loop().connect_read_pipe(
            lambda: asyncio.StreamReaderProtocol(reader), os.fdopen(descriptor, "rb", 0)
        )
        self._pipes.append(pipe)
        self._reading.append(asyncio.create_task(output.read(reader)))

    async def until_end(self) -> dict[str, Any]:
        """What the shim tells: first by an empty line that there is one. At its end nothing is left that could
        write, so the output ends too."""
        try:
            raw = await self._told()
            await asyncio.wait(self._reading, timeout=STOP_SECONDS)
        except BaseException:
            await self._stop()
            raise
        finally:
            self._close()
        if not raw:
            raise NotLaunchedError("the launcher was killed")
        if not raw.strip():
            raise SandboxError("the shim was killed")
        told: dict[str, Any] = json.loads(raw)
        if "error" in told:
            raise SandboxError(f"{told['error']} {self.stderr.text[-200:]}".strip())
        return told

    async def _told(self) -> bytes:
        raw = b""
        while part := await asyncio.get_running_loop().sock_recv(self._channel, CHUNK):
            raw += part
        return raw

    async def _stop(self) -> None:
        """The shim sees it, kills all that is below it, removes the directory and ends."""
        self._channel.shutdown(socket.SHUT_WR)
        try:
            async with asyncio.timeout(STOP_SECONDS):
                await self._told()
        except (TimeoutError, ConnectionError):
            log.warning("a cancelled program takes its time to end")

    def _close(self) -> None:
        for task in self._reading:
            task.cancel()
        for pipe in self._pipes:
            pipe.close()
        self._channel.close()
