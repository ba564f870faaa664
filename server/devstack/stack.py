"""All stores under one data directory, with ports and secrets that stay the same from start to start."""

import contextlib
import fcntl
import json
import secrets
import shlex
import socket
from pathlib import Path
from typing import Any

from server.devstack.process import StackError
from server.devstack.stores import HOST, Mongo, Postgres, Say, Store, Valkey

FOLDER_MODE, SECRET_MODE = 0o711, 0o600


class Stack:
    """A context manager, to be entered in the main thread: the stores run inside it."""

    def __init__(self, data_dir: Path, *, say: Say = lambda _: None) -> None:
        self.data_dir = data_dir.absolute()
        self._say = say
        self._held = contextlib.ExitStack()

    def __enter__(self) -> "Stack":
        try:
            self._make_folder()
            kept = self._kept()
            logs = self.data_dir / "logs"
            logs.mkdir(exist_ok=True)
            ports, passwords = kept["ports"], kept["passwords"]
            self.secrets: dict[str, str] = kept["secrets"]
            self.postgres = Postgres(
                self.data_dir, port=ports["postgres"], password=passwords["postgres"], logs=logs, say=self._say
            )
            self.valkey = Valkey(self.data_dir, port=ports["valkey"], password=passwords["valkey"], logs=logs)
            self.mongo = Mongo(self.data_dir, port=ports["mongo"], logs=logs)
            self._start()
        except BaseException:
            self._held.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        try:
            self.stop()
        finally:
            self._held.close()

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

    def write_env(self, *, port: int) -> Path:
        """``stack.env``, in shell syntax, for whoever wants to join."""
        path = self.data_dir / "stack.env"
        path.unlink(missing_ok=True)
        path.touch(mode=SECRET_MODE)
        lines = (f"{key}={shlex.quote(value)}\n" for key, value in {**self.environment, "PORT": str(port)}.items())
        path.write_text("".join(lines))
        return path

    def stop(self) -> None:
        """All at once, each in order."""
        for store in self.stores:
            store.child.ask_to_stop()
        for store in self.stores:
            store.child.wait()

    def _start(self) -> None:
        try:
            for store in self.stores:
                store.begin()
            for store in self.stores:
                store.wait_ready()
        except BaseException:
            for store in self.stores:
                store.kill()
            raise

    def _make_folder(self) -> None:
        """The data directory, ours alone for as long as we run.

        Raises:
            StackError: it cannot be written, or another process uses it.
        """
        try:
            self.data_dir.mkdir(parents=True, exist_ok=True)
            self.data_dir.chmod(FOLDER_MODE)
            lock = self._held.enter_context((self.data_dir / "lock").open("w"))
        except OSError as error:
            raise StackError(f"DATA_DIR {self.data_dir} cannot be written: {error.strerror}") from error
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise StackError(f"DATA_DIR {self.data_dir} is in use by another `run.py dev`") from None

    def _kept(self) -> dict[str, Any]:
        """Ports, passwords and secrets: made once; a port that was taken in the meantime is replaced."""
        path = self.data_dir / "stack.json"
        kept: dict[str, Any] = json.loads(path.read_text()) if path.exists() else _fresh()
        for name, port in kept["ports"].items():
            if not is_free(HOST, port):
                kept["ports"][name] = free_port()
        path.touch(mode=SECRET_MODE)
        path.write_text(json.dumps(kept, indent=1))
        return kept


def _fresh() -> dict[str, Any]:
    return {
        "ports": {name: free_port() for name in ("postgres", "valkey", "mongo")},
        "passwords": {name: secrets.token_urlsafe(24) for name in ("postgres", "valkey")},
        "secrets": {name: secrets.token_urlsafe(48) for name in ("JWT_SECRET", "JWT_REFRESH_SECRET")},
    }


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        port: int = probe.getsockname()[1]
        return port


def is_free(host: str, port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError:
            return False
    return True
