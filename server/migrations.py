"""Migrations: yoyo applies ``sql/migrations``, one process at a time.

yoyo's own lock is a row, which a killed run leaves behind. This module takes an advisory lock, which PostgreSQL
releases with the connection, so several deploys at once are safe.
"""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, urlencode, urlsplit, urlunsplit

import psycopg
import yoyo

from server.settings import StartError

MIGRATIONS_DIR = Path(__file__).parent.parent / "sql" / "migrations"
ADVISORY_LOCK_ID = 0x77_6B_73_70  # "wksp": any number, the same in every version
CONNECT_TIMEOUT_SECONDS = 5


class MigrationError(StartError):
    """The migrations cannot be read or applied; the text is one line."""


def pending(database_url: str) -> list[str]:
    """Return the names of the migrations that the database lacks, oldest first.

    Raises:
        MigrationError: the database is unavailable.
    """
    with _backend(database_url) as backend:
        return [migration.id for migration in backend.to_apply(_read_all())]


def apply(database_url: str) -> list[str]:
    """Apply the pending migrations, in one process at a time; return the names of those that were applied.

    Raises:
        MigrationError: the database is unavailable, or a migration failed (and was rolled back).
    """
    with _advisory_lock(database_url), _backend(database_url) as backend:
        steps = backend.to_apply(_read_all())
        backend.apply_migrations(steps)
        return [migration.id for migration in steps]


def roll_back(database_url: str) -> list[str]:
    """Undo all migrations, newest first; for tests of the rollback scripts."""
    with _advisory_lock(database_url), _backend(database_url) as backend:
        steps = backend.to_rollback(_read_all())
        backend.rollback_migrations(steps)
        return [migration.id for migration in steps]


def _read_all() -> Any:
    return yoyo.read_migrations(str(MIGRATIONS_DIR))


@contextmanager
def _advisory_lock(database_url: str) -> Iterator[None]:
    with _translate_errors(database_url), psycopg.connect(_with_connect_timeout(database_url), autocommit=True) as lock:
        lock.execute("SELECT pg_advisory_lock(%s)", (ADVISORY_LOCK_ID,))
        yield


@contextmanager
def _backend(database_url: str) -> Iterator[Any]:
    logging.getLogger("yoyo.migrations").setLevel(logging.WARNING)
    with _translate_errors(database_url):
        backend = yoyo.get_backend(
            urlunsplit(urlsplit(_with_connect_timeout(database_url))._replace(scheme="postgresql+psycopg"))
        )
        try:
            yield backend
        finally:
            backend.connection.close()


def _with_connect_timeout(database_url: str) -> str:
    """Return the URL with a timeout for connecting."""
    parts = urlsplit(database_url)
    options = {"connect_timeout": str(CONNECT_TIMEOUT_SECONDS), **dict(parse_qsl(parts.query))}
    return urlunsplit(parts._replace(query=urlencode(options)))


@contextmanager
def _translate_errors(database_url: str) -> Iterator[None]:
    try:
        yield
    except psycopg.Error as error:
        address = urlsplit(database_url).netloc.rpartition("@")[2]
        problem = "cannot be used" if isinstance(error, psycopg.OperationalError) else "rejected a migration"
        raise MigrationError(f"PostgreSQL at {address} {problem}: {' '.join(str(error).split())}") from error
