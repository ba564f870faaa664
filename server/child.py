"""Child processes: each in its own session, without the parent's descriptors except those passed to it."""

import asyncio
import contextlib
import ctypes
import fcntl
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path

from server.settings import StartError

START_TIMEOUT_SECONDS = 30.0
STOP_TIMEOUT_SECONDS = 15.0
POLL_INTERVAL_SECONDS = 0.02
MAX_LOG_BYTES = 16 << 20  # a larger log is rotated; the previous one is kept as well
_PR_SET_PDEATHSIG = 1
_LIBC = ctypes.CDLL(None)
# Looked up at import: between fork and exec nothing may wait for a lock.
_prctl, _syscall, _fcntl = _LIBC.prctl, _LIBC.syscall, _LIBC.fcntl
_CLOSE_RANGE, _CLOSE_RANGE_CLOEXEC = 436, 4  # close_range(2), Linux 5.11; the number is the same on all architectures
_LAST_DESCRIPTOR = ctypes.c_uint(0xFFFFFFFF)


class StackError(StartError):
    """A process or store cannot be started; the text is one line."""


class Child:
    """A child process. Start it in the main thread only: the kernel kills it when the *thread* that made it ends.

    ``stop_signal`` asks the child for a graceful shutdown. ``parent_death_signal`` is what the kernel sends to the
    child when this process is killed: SIGKILL is certain, while a Python program that waits in its main thread may
    not react to another signal. ``lock`` is a file whose lock the child and all its processes inherit: the next start
    waits until all of them have ended, whichever process started them. Two instances of a store on one directory
    would corrupt the data. ``inherit`` are further open files for the child.
    """

    def __init__(
        self,
        name: str,
        command: Sequence[str],
        *,
        log: Path | None = None,
        lock: Path | None = None,
        stop_signal: signal.Signals = signal.SIGTERM,
        parent_death_signal: signal.Signals = signal.SIGKILL,
        user: int | None = None,
        environment: dict[str, str] | None = None,
        inherit: tuple[int, ...] = (),
    ) -> None:
        self.name = name
        self._command = list(command)
        self._inherit = inherit
        self._log = log
        self._log_offset = 0
        self._lock = lock
        self._stop_signal = stop_signal
        self._parent_death_signal = parent_death_signal
        self._user = user
        self._environment = environment
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def pid(self) -> int | None:
        return self._process.pid if self._process and self.alive else None

    @property
    def last_pid(self) -> int | None:
        """The process id of the current or last run."""
        return self._process.pid if self._process else None

    @property
    def alive(self) -> bool:
        return self._process is not None and self._process.poll() is None

    @property
    def exit_code(self) -> int | None:
        return self._process.poll() if self._process else None

    def start(self, prepare: Callable[[], None] = lambda: None) -> None:
        """Wait for the processes of an earlier run, call ``prepare``, then start.

        Raises:
            StackError: an earlier run does not end, or the program cannot be executed.
        """
        with self._exclusive() as inherited, self._open_log() as output:
            prepare()
            try:
                self._process = subprocess.Popen(
                    self._command,
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=output if output is None else subprocess.STDOUT,
                    env=self._environment,
                    pass_fds=(*inherited, *self._inherit),
                    start_new_session=True,
                    user=self._user,
                    group=self._user,
                    extra_groups=None if self._user is None else [],
                    # Runs after the change of user, which would clear the parent death signal.
                    preexec_fn=_set_parent_death_signal(self._parent_death_signal, os.getpid()),
                )
            except OSError as error:
                raise StackError(f"{self.name} cannot be started: {error}") from error

    def wait_ready(self, ready: Callable[[], bool], *, timeout: float = START_TIMEOUT_SECONDS) -> None:
        """Poll ``ready`` until it is true.

        Raises:
            StackError: the child ends or is not ready in time; the text quotes its log.
        """
        deadline = time.monotonic() + timeout
        while not ready():
            if not self.alive:
                raise StackError(f"{self.name} ended with {self.exit_code} at its start: {self._log_tail()}")
            if time.monotonic() > deadline:
                raise StackError(f"{self.name} was not ready within {timeout:.0f} s: {self._log_tail()}")
            time.sleep(POLL_INTERVAL_SECONDS)

    def wait_for_previous(self, *, timeout: float = STOP_TIMEOUT_SECONDS) -> None:
        """Wait for the processes of an earlier run, of this parent or of a killed one.

        Raises:
            StackError: they do not end in time.
        """
        deadline = time.monotonic() + timeout
        while not self._previous_ended():
            if time.monotonic() > deadline:
                assert self._lock
                holder = self._lock.read_text() or "unknown"
                raise StackError(f"{self.name} of an earlier run has not ended yet; end its process {holder}")
            time.sleep(POLL_INTERVAL_SECONDS)

    def send_stop_signal(self, signal_override: signal.Signals | None = None) -> None:
        if self._process and self.alive:
            self._process.send_signal(signal_override or self._stop_signal)

    def wait(self, *, timeout: float = STOP_TIMEOUT_SECONDS) -> bool:
        """Wait for the child to end, else kill it; return whether it ended by itself."""
        try:
            if self._process is not None:
                self._process.wait(timeout=timeout)
        except subprocess.TimeoutExpired:
            self.kill()
            return False
        return True

    def stop(self) -> None:
        self.send_stop_signal()
        self.wait()

    def kill(self) -> None:
        """Send SIGKILL to the whole process group."""
        if self._process is None or not self.alive:
            return  # the kernel may have reused the process id
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()

    @contextlib.contextmanager
    def _exclusive(self) -> Iterator[tuple[int, ...]]:
        """Hold the lock until the child has inherited it; yield the descriptors to inherit."""
        if self._lock is None:
            yield ()
            return
        self.wait_for_previous()
        with self._lock.open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield (lock.fileno(),)
            lock.write(f"{self.pid}")

    def _previous_ended(self) -> bool:
        if self._lock is None:
            return not self.alive
        with self._lock.open("a") as lock:
            return try_lock(lock.fileno())

    @contextlib.contextmanager
    def _open_log(self) -> Iterator[int | None]:
        """Open the log, rotated; yield its descriptor, or None if the child writes to this process's terminal."""
        if self._log is None:
            yield None
            return
        if self._log.exists() and self._log.stat().st_size > MAX_LOG_BYTES:
            self._log.replace(self._log.with_suffix(".old.log"))
        with self._log.open("ab") as output:
            self._log_offset = output.tell()
            yield output.fileno()

    def _log_tail(self) -> str:
        if self._log is None:
            return "see its output above"
        with self._log.open("rb") as log:
            log.seek(self._log_offset)
            lines = log.read().decode(errors="replace").strip().splitlines()
        # PostgreSQL's last line only says that it has shut down.
        errors = [line for line in lines if "FATAL" in line or "rror" in line] or lines or ["no output"]
        return f"{errors[-1].strip()} ({self._log})"


async def spawn_process(
    *command: str,
    stdin: int = subprocess.DEVNULL,
    stdout: int = subprocess.DEVNULL,
    stderr: int = subprocess.DEVNULL,
    inherit: Sequence[int] = (),
    environment: Mapping[str, str] | None = None,
    cwd: str | Path | None = None,
    limit: int = 1 << 16,
) -> asyncio.subprocess.Process:
    """Start a program in its own session, on the running loop.

    The program gets the three streams and ``inherit``, and no other descriptor. uvloop does not close inheritable
    descriptors, and for a stream that is None it leaves an inheritable copy of the parent's stream: hence no stream
    may be None. ``limit`` is the maximum line length of its output, in bytes.

    Raises:
        OSError: the program cannot be executed.
    """
    return await asyncio.create_subprocess_exec(
        *command,
        stdin=stdin,
        stdout=stdout,
        stderr=stderr,
        pass_fds=tuple(inherit),
        env=environment,
        cwd=cwd,
        limit=limit,
        start_new_session=True,
        preexec_fn=partial(_close_on_exec, tuple(inherit)),
    )


def open_standard_streams() -> None:
    """Open the null device for each of the descriptors 0, 1 and 2 that is closed.

    Else the next file or socket would get that number, and child processes would write their errors into it.
    """
    while (descriptor := os.open(os.devnull, os.O_RDWR)) <= 2:
        os.set_inheritable(descriptor, True)
    os.close(descriptor)


def try_lock(file: int) -> bool:
    """Try to lock an open file; return whether it is locked now. The lock ends when its last holder closes the file."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _close_on_exec(inherit: tuple[int, ...]) -> None:
    """Mark all descriptors from 3 upwards close-on-exec, except ``inherit``; runs between fork and exec.

    Closing them at once would be too early: the streams still have other numbers, and the pipe that reports a failed
    exec is among them.
    """
    if _syscall(_CLOSE_RANGE, 3, _LAST_DESCRIPTOR, _CLOSE_RANGE_CLOEXEC) != 0:
        raise OSError("close_range")
    for descriptor in inherit:
        _fcntl(descriptor, fcntl.F_SETFD, 0)


def _set_parent_death_signal(number: signal.Signals, parent: int) -> Callable[[], None]:
    def prepare() -> None:
        _prctl(_PR_SET_PDEATHSIG, int(number), 0, 0, 0)
        if os.getppid() != parent:  # the parent died in between
            os._exit(1)

    return prepare
