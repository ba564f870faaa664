"""A streaming replica of the embedded PostgreSQL, made as an operator makes one."""

import asyncio
import os
import subprocess
from pathlib import Path
from typing import Any

import psycopg

from server.devstack.postgres import Postgres
from server.devstack.stack import free_port
from server.devstack.stores import Store, StoreConfig
from tests.timeouts import WAIT_TIMEOUT_SECONDS


class Replica(Postgres):
    """A replica of ``primary`` in its own directory, which must be empty."""

    name = "PostgreSQL's replica"

    def __init__(self, primary: Postgres, directory: Path) -> None:
        for name in ("logs", "locks"):
            (directory / name).mkdir()
        directory.chmod(0o711)
        self._primary = primary
        self._folder = directory
        super().__init__(StoreConfig(directory, free_port(), lambda _: None), password=primary._password)

    def wait_ready(self) -> None:
        Store.wait_ready(self)  # a replica cannot create the database

    def pause_replay(self) -> None:
        """Stop applying changes of the primary until ``resume_replay``."""
        self._run("SELECT pg_wal_replay_pause()")

    def resume_replay(self) -> None:
        self._run("SELECT pg_wal_replay_resume()")

    async def catch_up(self) -> None:
        """Wait until the replica has applied all commits of the primary up to now."""
        position = _query(self._primary.url, "SELECT pg_current_wal_lsn()::text")
        async with asyncio.timeout(WAIT_TIMEOUT_SECONDS):
            while not self._run(f"SELECT pg_last_wal_replay_lsn() >= '{position}'"):
                await asyncio.sleep(0.02)

    def _run(self, statement: str) -> Any:
        return _query(self.url, statement)

    def _init_data_dir(self) -> None:
        data = self._folder / "postgres"
        data.mkdir(mode=0o700)
        if self._user is not None:
            os.chown(data, self._user, self._user)
        subprocess.run(
            [
                str(self.bin_dir / "pg_basebackup"),
                *("--pgdata", str(data)),
                *("--dbname", self._primary.url),
                "--write-recovery-conf",
                "--checkpoint=fast",
            ],
            check=True,
            capture_output=True,
            timeout=60,
            user=self._user,
            group=self._user,
            extra_groups=None if self._user is None else [],
        )


def _query(url: str, statement: str) -> Any:
    with psycopg.connect(url, autocommit=True) as connection:
        return (connection.execute(statement).fetchone() or (None,))[0]
