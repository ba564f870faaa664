"""Migrations: yoyo applies ``sql/migrations``, one process at a time.

yoyo's own lock is a row, which a killed run leaves behind; ours is an advisory lock, which PostgreSQL drops
with the connection, so that several deploys at once are safe.
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

FOLDER = Path(__file__).parent.parent / "sql" / "migrations"
LOCK = 0x77_6B_73_70  # "wksp": any number, the same in every version
CONNECT_SECONDS = 5


class MigrationError(StartError):
    """The migrations could not be read or applied; the text is one line."""


def pending(database_url: str) -> list[str]:
    """Names of the migrations that the database lacks, oldest first.

    Raises:
        MigrationError: the database is away.
    """
    with _backend(database_url) as backend:
        return [each.id for each in backend.to_apply(_all())]


def apply(database_url: str) -> list[str]:
    """Apply what is pending, in one process at a time; the names of what was applied.

    Raises:
        MigrationError: the database is away, or a migration failed (and was rolled back).
    """
    with _alone(database_url), _backend(database_url) as backend:
        steps = backend.to_apply(_all())
        backend.apply_migrations(steps)
        return [each.id for each in steps]


def roll_back(database_url: str) -> list[str]:
    """Undo every migration, newest first; for tests of the rollback scripts."""
    with _alone(database_url), _backend(database_url) as backend:
        steps = backend.to_rollback(_all())
        backend.rollback_migrations(steps)
        return [each.id for each in steps]


def _all() -> Any:
    return yoyo.read_migrations(str(FOLDER))


@contextmanager
def _alone(database_url: str) -> Iterator[None]:
    with _reported(database_url), psycopg.connect(_bounded(database_url), autocommit=True) as lock:
        lock.execute("SELECT pg_advisory_lock(%s)", (LOCK,))
        yield


@contextmanager
def _backend(database_url: str) -> Iterator[Any]:
    logging.getLogger("yoyo.migrations").setLevel(logging.WARNING)
    with _reported(database_url):
        backend = yoyo.get_backend(urlunsplit(urlsplit(_bounded(database_url))._replace(scheme="postgresql+psycopg")))
        try:
            yield backend
        finally:
            backend.connection.close()


def _bounded(database_url: str) -> str:
    """The address with a time limit for connecting."""
    parts = urlsplit(database_url)
    options = {"connect_timeout": str(CONNECT_SECONDS), **dict(parse_qsl(parts.query))}
    return urlunsplit(parts._replace(query=urlencode(options)))


@contextmanager
def _reported(database_url: str) -> Iterator[None]:
    try:
        yield
    except psycopg.Error as error:
        where = urlsplit(database_url).netloc.rpartition("@")[2]
        what = "cannot be used" if isinstance(error, psycopg.OperationalError) else "refused a migration"
        raise MigrationError(f"PostgreSQL at {where} {what}: {' '.join(str(error).split())}") from error
