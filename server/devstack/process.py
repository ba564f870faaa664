"""A child process in a session of its own, which cannot outlive us."""

import contextlib
import ctypes
import os
import signal
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path

START_SECONDS = 30.0
STOP_SECONDS = 15.0
POLL_SECONDS = 0.02
_PR_SET_PDEATHSIG = 1
_LIBC = ctypes.CDLL(None, use_errno=True)


class StackError(Exception):
    """Something cannot be started; the text is one line."""


class Child:
    """Started from the main thread only: the kernel ends a child with the *thread* that made it.

    ``goodbye`` is the signal that asks it to stop in order; it gets the same when we are killed.
    """

    def __init__(
        self,
        name: str,
        command: Sequence[str],
        *,
        log: Path | None,
        goodbye: signal.Signals = signal.SIGTERM,
        user: int | None = None,
        environment: dict[str, str] | None = None,
    ) -> None:
        self.name = name
        self._command = list(command)
        self._log = log
        self._goodbye = goodbye
        self._user = user
        self._environment = environment
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def pid(self) -> int | None:
        return self._process.pid if self._process and self.alive else None

    @property
    def alive(self) -> bool:
        return self._process is not None and self._process.poll() is None

    @property
    def exit_code(self) -> int | None:
        return self._process.poll() if self._process else None

    def start(self) -> None:
        """Raises StackError where the program cannot be executed."""
        output = self._log.open("ab") if self._log else None
        try:
            self._process = subprocess.Popen(
                self._command,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT if output else None,
                env=self._environment,
                start_new_session=True,
                user=self._user,
                group=self._user,
                extra_groups=None if self._user is None else [],
                # After the change of user, which would clear it.
                preexec_fn=_dies_with_us(self._goodbye, os.getpid()),
            )
        except OSError as error:
            raise StackError(f"{self.name} cannot be started: {error}") from error
        finally:
            if output:
                output.close()

    def wait_until(self, ready: Callable[[], bool], *, seconds: float = START_SECONDS) -> None:
        """Raises StackError with the last line of its log where it ends or is not ready in time."""
        deadline = time.monotonic() + seconds
        while not ready():
            if not self.alive:
                raise StackError(f"{self.name} ended with {self.exit_code} at its start: {self._last_words()}")
            if time.monotonic() > deadline:
                raise StackError(f"{self.name} was not ready within {seconds:.0f} s: {self._last_words()}")
            time.sleep(POLL_SECONDS)

    def ask_to_stop(self) -> None:
        if self._process and self.alive:
            self._process.send_signal(self._goodbye)

    def wait(self, *, seconds: float = STOP_SECONDS) -> None:
        """Wait for its end; kill it when it takes too long."""
        if self._process is None:
            return
        try:
            self._process.wait(timeout=seconds)
        except subprocess.TimeoutExpired:
            self.kill()

    def stop(self) -> None:
        self.ask_to_stop()
        self.wait()

    def kill(self) -> None:
        """SIGKILL to the whole session, at once."""
        if self._process is None:
            return
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()

    def _last_words(self) -> str:
        if self._log is None or not self._log.exists():
            return "see above"
        lines = self._log.read_text(errors="replace").strip().splitlines()
        return f"{lines[-1].strip()} ({self._log})" if lines else f"it wrote nothing ({self._log})"


def _dies_with_us(goodbye: signal.Signals, parent: int) -> Callable[[], None]:
    def prepare() -> None:
        _LIBC.prctl(_PR_SET_PDEATHSIG, int(goodbye), 0, 0, 0)
        if os.getppid() != parent:  # we died in between
            os._exit(1)

    return prepare
