"""Real server and worker processes, as an operator starts them."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

from tests.timeouts import PROCESS_TIMEOUT_SECONDS

ROOT = Path(__file__).parent.parent
OVERRIDE_SCRIPT = """
import runpy, sys
sys.path.insert(0, {root!r})  # as when run.py itself is run
import {module}
{change}
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


class Process:
    """A process of ``run.py``.

    ``overrides`` sets a constant of time in it, so that the test need not wait: ``server.worker.JOB_GRACE_SECONDS=1``.
    """

    def __init__(
        self,
        command: str,
        *arguments: str,
        environment: dict[str, str],
        log: Path,
        override: str = "",
        **settings: str,
    ) -> None:
        self.log = log
        module = override.partition("=")[0].rpartition(".")[0]
        run = ["-c", OVERRIDE_SCRIPT.format(root=str(ROOT), module=module, change=override)] if override else []
        with log.open("wb") as output:
            self._process = subprocess.Popen(
                [sys.executable, *run, str(ROOT / "run.py"), command, *arguments],
                env={**os.environ, **environment, "LOG_LEVEL": "info", "LOG_FORMAT": "json", **settings},
                stdout=output,
                stderr=subprocess.STDOUT,
                cwd=log.parent,  # away from any .env
            )

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def alive(self) -> bool:
        return self._process.poll() is None

    @property
    def output(self) -> str:
        return self.log.read_text(errors="replace")

    def wait_for_output(self, pattern: str, *, seconds: float = PROCESS_TIMEOUT_SECONDS) -> re.Match[str]:
        """Wait for a pattern in the output of the process; return the first match."""
        deadline = time.monotonic() + seconds
        while (match := re.search(pattern, self.output)) is None:
            if self._process.poll() is not None:
                raise AssertionError(f"ended with {self._process.returncode}:\n{self.output}")
            if time.monotonic() > deadline:
                raise AssertionError(f"no {pattern!r} in time:\n{self.output}")
            time.sleep(0.02)
        return match

    def terminate(self, *, seconds: float = PROCESS_TIMEOUT_SECONDS, number: int = signal.SIGTERM) -> int:
        """Send a stop signal and wait; return the exit code."""
        self._process.send_signal(number)
        return self._process.wait(timeout=seconds)

    def wait(self, *, seconds: float = PROCESS_TIMEOUT_SECONDS) -> int:
        return self._process.wait(timeout=seconds)

    def freeze(self) -> None:
        self._process.send_signal(signal.SIGSTOP)

    def unfreeze(self) -> None:
        self._process.send_signal(signal.SIGCONT)

    def kill(self) -> None:
        self._process.kill()
        self._process.wait()


class Server(Process):
    @property
    def base(self) -> str:
        """The URL of the server; waits until it is ready."""
        return self.wait_for_output(r'"address":"(http://[^"]+)"').group(1)


class Worker(Process):
    def ready(self) -> "Worker":
        self.wait_for_output("worker ready")
        return self


class Processes:
    """A context manager that starts processes and kills those that still run at its end."""

    def __init__(self, environment: dict[str, str], directory: Path) -> None:
        self._environment = environment
        self._folder = directory
        self._running: list[Process] = []

    def __enter__(self) -> "Processes":
        return self

    def __exit__(self, *_: object) -> None:
        for process in self._running:
            if process._process.poll() is None:
                process.kill()

    def server(self, *arguments: str, **settings: str) -> Server:
        process = Server("server", *arguments, environment=self._environment, log=self._log(), **settings)
        self._running.append(process)
        return process

    def worker(self, *arguments: str, **settings: str) -> Worker:
        process = Worker("worker", *arguments, environment=self._environment, log=self._log(), **settings)
        self._running.append(process)
        return process

    def command(self, command: str, *arguments: str, **settings: str) -> Process:
        process = Process(command, *arguments, environment=self._environment, log=self._log(), **settings)
        self._running.append(process)
        return process

    def _log(self) -> Path:
        return self._folder / f"process-{len(self._running)}.log"
