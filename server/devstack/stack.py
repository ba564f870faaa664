"""All stores under one data directory, with ports and secrets that stay the same from start to start."""

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
from server.devstack.stores import HOST, Place, Say, Store
from server.devstack.valkey import Valkey
from server.settings import authority

FOLDER_MODE, PRIVATE_MODE, SECRET_MODE = 0o711, 0o700, 0o600
STORES = ("postgres", "valkey", "mongo")
# Below the range out of which Linux takes the ports of outgoing connections: one of these could sit on the port of
# a store that is about to come back.
PORTS = range(20_000, 32_000)


class Stack:
    """A context manager, to be entered in the main thread: the stores run inside it.

    Raises:
        StackError: the directory cannot be used, or a store cannot be started.
    """

    postgres: Postgres
    valkey: Valkey
    mongo: Mongo
    secrets: dict[str, str]

    def __init__(self, data_dir: Path, *, say: Say = lambda _: None) -> None:
        self.data_dir = data_dir.absolute()
        self._say = say
        self._held = contextlib.ExitStack()

    def __enter__(self) -> "Stack":
        try:
            self._make_folder()
            self._place_stores(self._kept())
            self._start()
        except OSError as error:
            self._held.close()
            raise StackError(f"DATA_DIR {self.data_dir} cannot be used: {error}") from error
        except BaseException:
            self._held.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        try:
            self.stop()
        finally:
            self._held.close()

    @classmethod
    def running_in(cls, data_dir: Path) -> "Stack":
        """Return the stores that another process keeps running there: their addresses, not their processes.

        Raises:
            StackError: what is kept there is damaged.
        """
        found = cls(data_dir)
        found._build(found._kept())
        return found

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
        """What a server or worker needs to join."""
        return self.urls | self.secrets

    def write_env(self, *, host: str, port: int) -> Path:
        """``stack.env``, in shell syntax, for whoever wants to join."""
        path = self.data_dir / "stack.env"
        pairs = {**self.environment, "HOST": host, "PORT": str(port)}.items()
        _write_private(path, "".join(f"{key}={shlex.quote(value)}\n" for key, value in pairs))
        return path

    def stop(self) -> None:
        """All at once, each in order."""
        for store in self.stores:
            store.child.ask_to_stop()
        for store in self.stores:
            store.child.wait()

    def kill(self) -> None:
        """SIGKILL to all of them, at once."""
        for store in self.stores:
            store.kill()

    def _make_folder(self) -> None:
        """The data directory, ours alone for as long as we run.

        Raises:
            StackError: it cannot be written, or another process uses it.
        """
        try:
            if not self.data_dir.exists():  # one that somebody else made keeps its mode
                self.data_dir.mkdir(parents=True)
                self.data_dir.chmod(FOLDER_MODE)
            for name in ("logs", "locks"):
                (self.data_dir / name).mkdir(mode=PRIVATE_MODE, exist_ok=True)
            lock = self._held.enter_context((self.data_dir / "locks" / "stack").open("w"))
        except OSError as error:
            raise StackError(f"DATA_DIR {self.data_dir} cannot be written: {error.strerror}") from error
        if not try_lock(lock.fileno()):
            raise StackError(f"DATA_DIR {self.data_dir} is in use by another `run.py dev`")

    def _place_stores(self, kept: dict[str, Any]) -> None:
        """The stores at their ports; one that was taken in the meantime is replaced."""
        self._build(kept)
        # Before the ports are looked at: those of a killed dev may still be about to let theirs go.
        for store in self.stores:
            store.child.wait_until_gone()
        taken = [name for name, port in kept["ports"].items() if not is_free(HOST, port)]
        if taken:
            kept["ports"] |= zip(taken, _free_ports(len(taken)), strict=True)
            self._keep(kept)
            self._build(kept)

    def _build(self, kept: dict[str, Any]) -> None:
        places = {name: Place(self.data_dir, kept["ports"][name], self._say) for name in STORES}
        self.postgres = Postgres(places["postgres"], password=kept["passwords"]["postgres"])
        self.valkey = Valkey(places["valkey"], password=kept["passwords"]["valkey"])
        self.mongo = Mongo(places["mongo"])
        self.secrets = kept["secrets"]

    def _start(self) -> None:
        try:
            for store in self.stores:
                store.begin()
            for store in self.stores:
                store.wait_ready()
        except BaseException:
            self.kill()
            raise

    def _kept(self) -> dict[str, Any]:
        """Ports, passwords and secrets: made once."""
        path = self._kept_in
        if not path.exists():
            self._keep(_fresh())
        try:
            kept: dict[str, Any] = json.loads(path.read_text())
        except ValueError as error:
            raise StackError(f"{path} is damaged, and the stores' passwords with it: {error}") from error
        return kept

    def _keep(self, kept: dict[str, Any]) -> None:
        _write_private(self._kept_in, json.dumps(kept, indent=1))

    @property
    def _kept_in(self) -> Path:
        return self.data_dir / "stack.json"


def is_in_use(data_dir: Path) -> bool:
    """Whether a `run.py dev` runs on it, or is starting."""
    try:
        with (data_dir / "locks" / "stack").open("a") as lock:
            return not try_lock(lock.fileno())
    except OSError:
        return False


def read_env(path: Path) -> dict[str, str]:
    """What ``Stack.write_env`` wrote."""
    return dict(word.split("=", 1) for word in shlex.split(path.read_text()))


def check_address(host: str, port: int) -> None:
    """Raises StackError where nobody could listen."""
    try:
        _bind(host, port)
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise StackError(f"Port {port} on {host} is taken; set PORT to another") from error
        raise StackError(f"Cannot listen on {authority(host, port)}: {error.strerror}") from error


def is_free(host: str, port: int) -> bool:
    try:
        _bind(host, port)
    except OSError:
        return False
    return True


def free_port() -> int:
    return _free_ports(1)[0]


def _free_ports(count: int) -> list[int]:
    free = [port for port in random.sample(PORTS, 100) if is_free(HOST, port)]
    return free[:count]


def _bind(host: str, port: int) -> None:
    family, kind, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    with socket.socket(family, kind) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as every server does
        probe.bind(address)


def _fresh() -> dict[str, Any]:
    return {
        "ports": dict(zip(STORES, _free_ports(len(STORES)), strict=True)),
        "passwords": {name: secrets.token_urlsafe(24) for name in ("postgres", "valkey")},
        "secrets": {name: secrets.token_urlsafe(48) for name in ("JWT_SECRET", "JWT_REFRESH_SECRET")},
    }


def _write_private(path: Path, text: str) -> None:
    """For our user alone, and never half written."""
    fresh = path.with_name(f"{path.name}.new")
    fresh.unlink(missing_ok=True)
    fresh.touch(mode=SECRET_MODE)
    fresh.write_text(text)
    fresh.replace(path)
