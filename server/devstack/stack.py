"""All stores under one data directory, with ports and secrets that stay the same across restarts."""

import contextlib
import errno
import json
import random
import secrets
import shlex
import socket
from pathlib import Path
from typing import Any

from server.child import StackError, try_lock
from server.devstack.mongo import Mongo
from server.devstack.postgres import Postgres
from server.devstack.stores import HOST, PrintStatus, Store, StoreConfig
from server.devstack.valkey import Valkey
from server.settings import authority

DATA_DIR_MODE, PRIVATE_MODE, SECRET_MODE = 0o711, 0o700, 0o600
STORES = ("postgres", "valkey", "mongo")
# Below Linux's range for outgoing connections: one of these could occupy the port of a store that is restarting.
PORT_RANGE = range(20_000, 32_000)


class Stack:
    """A context manager that runs the stores; enter it in the main thread.

    Raises:
        StackError: the directory cannot be used, or a store cannot be started.
    """

    postgres: Postgres
    valkey: Valkey
    mongo: Mongo
    secrets: dict[str, str]

    def __init__(self, data_dir: Path, *, print_status: PrintStatus = lambda _: None) -> None:
        self.data_dir = data_dir.absolute()
        self._print_status = print_status
        self._exit_stack = contextlib.ExitStack()

    def __enter__(self) -> "Stack":
        try:
            self._make_data_dir()
            self._assign_ports(self._load_state())
            self._start()
        except OSError as error:
            self._exit_stack.close()
            raise StackError(f"DATA_DIR {self.data_dir} cannot be used: {error}") from error
        except BaseException:
            self._exit_stack.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        try:
            self.stop()
        finally:
            self._exit_stack.close()

    @classmethod
    def attach(cls, data_dir: Path) -> "Stack":
        """Return a stack that another process runs: its addresses, not its processes.

        Raises:
            StackError: the stored passwords are damaged.
        """
        stack = cls(data_dir)
        stack._build(stack._load_state())
        return stack

    @property
    def stores(self) -> tuple[Store, ...]:
        return self.postgres, self.valkey, self.mongo

    @property
    def urls(self) -> dict[str, str]:
        return {
            "DATABASE_URL": self.postgres.url,
            "REDIS_URL": self.valkey.url,
            "MONGODB_URI": self.mongo.url,
        }

    @property
    def environment(self) -> dict[str, str]:
        """The environment variables with which a server or worker uses these stores."""
        return self.urls | self.secrets

    def write_env(self, *, host: str, port: int) -> Path:
        """Write ``stack.env``, in shell syntax, for further servers and workers."""
        path = self.data_dir / "stack.env"
        pairs = {**self.environment, "HOST": host, "PORT": str(port)}.items()
        _write_private(path, "".join(f"{key}={shlex.quote(value)}\n" for key, value in pairs))
        return path

    def stop(self) -> None:
        """Stop all stores at the same time, each gracefully."""
        for store in self.stores:
            store.child.send_stop_signal()
        for store in self.stores:
            store.child.wait()

    def kill(self) -> None:
        """Send SIGKILL to all stores."""
        for store in self.stores:
            store.kill()

    def _make_data_dir(self) -> None:
        """Make the data directory and lock it while this process runs.

        Raises:
            StackError: it cannot be written, or another process uses it.
        """
        try:
            if not self.data_dir.exists():  # an existing directory keeps its mode
                self.data_dir.mkdir(parents=True)
                self.data_dir.chmod(DATA_DIR_MODE)
            for name in ("logs", "locks"):
                (self.data_dir / name).mkdir(mode=PRIVATE_MODE, exist_ok=True)
            lock = self._exit_stack.enter_context((self.data_dir / "locks" / "stack").open("w"))
        except OSError as error:
            raise StackError(f"DATA_DIR {self.data_dir} cannot be written: {error.strerror}") from error
        if not try_lock(lock.fileno()):
            raise StackError(f"DATA_DIR {self.data_dir} is in use by another `run.py dev`")

    def _assign_ports(self, state: dict[str, Any]) -> None:
        """Build the stores with their stored ports; replace ports that are taken."""
        self._build(state)
        # Before the ports are checked: the stores of a killed `run.py dev` may still be shutting down.
        for store in self.stores:
            store.child.wait_for_previous()
        taken = [name for name, port in state["ports"].items() if not is_port_free(HOST, port)]
        if taken:
            state["ports"] |= zip(taken, _free_ports(len(taken)), strict=True)
            self._save_state(state)
            self._build(state)

    def _build(self, state: dict[str, Any]) -> None:
        configs = {name: StoreConfig(self.data_dir, state["ports"][name], self._print_status) for name in STORES}
        self.postgres = Postgres(configs["postgres"], password=state["passwords"]["postgres"])
        self.valkey = Valkey(configs["valkey"], password=state["passwords"]["valkey"])
        self.mongo = Mongo(configs["mongo"])
        self.secrets = state["secrets"]

    def _start(self) -> None:
        try:
            for store in self.stores:
                store.launch()
            for store in self.stores:
                store.wait_ready()
        except BaseException:
            self.kill()
            raise

    def _load_state(self) -> dict[str, Any]:
        """Return the ports, passwords and secrets; generate them once."""
        path = self._state_file
        if not path.exists():
            self._save_state(_new_state())
        try:
            state: dict[str, Any] = json.loads(path.read_text())
        except ValueError as error:
            raise StackError(f"{path} is damaged, and the stores' passwords with it: {error}") from error
        return state

    def _save_state(self, state: dict[str, Any]) -> None:
        _write_private(self._state_file, json.dumps(state, indent=1))

    @property
    def _state_file(self) -> Path:
        return self.data_dir / "stack.json"


def is_in_use(data_dir: Path) -> bool:
    """Return whether a `run.py dev` uses the data directory, or is starting."""
    try:
        with (data_dir / "locks" / "stack").open("a") as lock:
            return not try_lock(lock.fileno())
    except OSError:
        return False


def read_env(path: Path) -> dict[str, str]:
    """Return the variables that ``Stack.write_env`` wrote."""
    return dict(word.split("=", 1) for word in shlex.split(path.read_text()))


def check_address(host: str, port: int) -> None:
    """Check that a server can listen on the address.

    Raises:
        StackError: the address is taken, or not an address of this machine.
    """
    try:
        _bind(host, port)
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise StackError(f"Port {port} on {host} is taken; set PORT to another") from error
        raise StackError(f"Cannot listen on {authority(host, port)}: {error.strerror}") from error


def is_port_free(host: str, port: int) -> bool:
    try:
        _bind(host, port)
    except OSError:
        return False
    return True


def free_port() -> int:
    return _free_ports(1)[0]


def _free_ports(count: int) -> list[int]:
    free = [port for port in random.sample(PORT_RANGE, 100) if is_port_free(HOST, port)]
    return free[:count]


def _bind(host: str, port: int) -> None:
    family, kind, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    with socket.socket(family, kind) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as every server does
        probe.bind(address)


def _new_state() -> dict[str, Any]:
    return {
        "ports": dict(zip(STORES, _free_ports(len(STORES)), strict=True)),
        "passwords": {name: secrets.token_urlsafe(24) for name in ("postgres", "valkey")},
        "secrets": {name: secrets.token_urlsafe(48) for name in ("JWT_SECRET", "JWT_REFRESH_SECRET")},
    }


def _write_private(path: Path, text: str) -> None:
    """Write a file atomically, readable by its owner only."""
    temporary = path.with_name(f"{path.name}.new")
    temporary.unlink(missing_ok=True)
    temporary.touch(mode=SECRET_MODE)
    temporary.write_text(text)
    temporary.replace(path)
