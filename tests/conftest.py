"""Fixtures. All stores are real; no part of the product is replaced.

Stores
    stack               one PostgreSQL, Valkey and MongoDB stand-in for the whole run, in a temporary directory; or
                        those that already run in the directory TEST_STACK
    own_stack           migrated stores for one test that kills them: ``own_stack.valkey.kill()``
    database_url        a migrated database on ``stack``
    empty_database_url  a database without tables; ``make_database()`` makes several
    isolated_stores     settings of a Redis and a MongoDB database apart from all others, on ``stack``:
                        ``make_server(**isolated_stores)``, ``processes.worker(**environment_of(isolated_stores))``
Servers
    settings            of an application in this process: cheap passwords, no rate limits
    make_server         starts applications in this process: ``await make_server(**settings)`` returns the URL
    no_periodic_recheck
                        these learn of changed access by notices only, not by a periodic recheck
    relaxed_timeouts    these do not take a store for unavailable because the machine is slow; automatic in every test,
                        except for the stores that hang in it: ``@pytest.mark.real_timeouts("redis_url")``
    server              the URL of one such application
    processes           starts real processes: ``processes.server()``, ``processes.worker()``
Users
    make_actor          registers users: ``await make_actor("Ada", server)``
    alice, bob, carol   three users on ``server``
"""

import asyncio
import contextlib
import dataclasses
import itertools
import os
import re
import secrets
import shutil
import tempfile
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import aiohttp
import psycopg
import pytest
import structlog
from aiohttp.test_utils import TestServer

from server import migrations, resources
from server.app import create_app
from server.devstack.stack import Stack
from server.pipelines import Pipelines
from server.rest.runner import HttpRunner
from server.settings import Settings, load
from tests.actors import Actor
from tests.processes import Processes

# As in server/logs.py: else tracebacks print the values of all variables, for seconds.
structlog.configure(
    processors=[
        *structlog.get_config()["processors"][:-1],
        structlog.dev.ConsoleRenderer(exception_formatter=structlog.dev.plain_traceback),
    ]
)

MakeServer = Callable[..., Awaitable[str]]
MakeActor = Callable[..., Awaitable[Actor]]


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """List the reasons of skipped tests, one line each: there are few, and each says what to install."""
    reasons = Counter(report.longrepr[2] for report in terminalreporter.getreports("skipped"))
    if reasons:
        terminalreporter.section("skipped")
    for reason, count in reasons.most_common():
        terminalreporter.line(f"{count:5} {reason.removeprefix('Skipped: ')}")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--chaos-seconds", help="how long the chaos story kills processes")
    parser.addoption("--chaos-seed", help="seed of the order in which it kills them")
    parser.addoption("--full", action="store_true", help="run the full form of tests that have a short one")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line(
        "markers",
        "real_timeouts(*stores): keep the product's timeouts for these hanging stores, or for the one in ``store``",
    )


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Disable coverage in tests of other processes: it would measure nothing there, and slow them down."""
    for item in items:
        if "processes" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.no_cover)


@pytest.fixture(scope="session")
def full(request: pytest.FixtureRequest) -> bool:
    """Return whether tests run in their full form."""
    return bool(request.config.getoption("--full"))


@pytest.fixture(scope="session")
def stack() -> Iterator[Stack]:
    running = os.environ.get("TEST_STACK")
    with contextlib.nullcontext(Stack.attach(Path(running))) if running else temporary_stack() as stack:
        yield stack


@pytest.fixture
def own_stack() -> Iterator[Stack]:
    with temporary_stack() as running:
        migrations.apply(running.postgres.url)
        yield running


@contextlib.contextmanager
def temporary_stack() -> Iterator[Stack]:
    """Run a stack in a temporary directory.

    It is not one of pytest's: these are closed to other users, and PostgreSQL may run as another user.
    """
    with (
        tempfile.TemporaryDirectory(prefix="stack-", ignore_cleanup_errors=True) as directory,
        Stack(Path(directory) / "data") as running,
    ):
        yield running
        running.mongo.kill()  # it would take 2 s to stop


@pytest.fixture(scope="session")
def database_url(stack: Stack) -> str:
    migrations.apply(stack.postgres.url)
    return stack.postgres.url


@pytest.fixture
def make_database(stack: Stack) -> Iterator[Callable[[], str]]:
    names: list[str] = []
    with psycopg.connect(stack.postgres.url, autocommit=True) as connection:

        def make() -> str:
            names.append(f"test_{secrets.token_hex(6)}")
            connection.execute(f"CREATE DATABASE {names[-1]}")
            return re.sub(r"/[^/]*$", f"/{names[-1]}", stack.postgres.url)

        yield make
        for name in names:
            connection.execute(f"DROP DATABASE {name} WITH (FORCE)")


@pytest.fixture
def empty_database_url(make_database: Callable[[], str]) -> str:
    return make_database()


RELAXED_TIMEOUT_SECONDS = 20.0
REQUEST_TIMEOUT_NAME = "server.rest.middlewares.STORE_DEADLINE_SECONDS"
STORE_TIMEOUT_NAMES = {
    "database_url": ("server.postgres.CONNECT_TIMEOUT_SECONDS", "server.postgres.STATEMENT_TIMEOUT_SECONDS"),
    "replica": ("server.replicas.REPLICA_TIMEOUT_SECONDS",),
    "mongodb_uri": ("server.resources.MONGO_REQUEST_TIMEOUT_SECONDS",),
    "redis_url": (
        "server.auth.blacklist.BLACKLIST_TIMEOUT_SECONDS",
        "server.auth.sessions.REVOCATION_TIMEOUT_SECONDS",
        "server.documents.rooms.SUBSCRIBE_SECONDS",
        "server.pipelines.REDIS_TIMEOUT_SECONDS",
        "server.projects.cache.CACHE_TIMEOUT_SECONDS",
        "server.ratelimit.HIT_TIMEOUT_SECONDS",
        "server.ratelimit.STALL_TIMEOUT_SECONDS",
        "server.realtime.room.MARKER_TIMEOUT_SECONDS",
        "server.realtime.subscriber.SUBSCRIBE_TIMEOUT_SECONDS",
        "server.resources.REDIS_TIMEOUT_SECONDS",
    ),
}


@pytest.fixture(autouse=True)
def relaxed_timeouts(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (
        REQUEST_TIMEOUT_NAME,
        "server.auth.passwords.HASH_WAIT_TIMEOUT_SECONDS",
        "server.resources.CONNECT_TIMEOUT_SECONDS",
    ):
        monkeypatch.setattr(name, RELAXED_TIMEOUT_SECONDS)
    for store in STORE_TIMEOUT_NAMES.keys() - stores_with_real_timeouts(request.node):
        for name in STORE_TIMEOUT_NAMES[store]:
            monkeypatch.setattr(name, RELAXED_TIMEOUT_SECONDS)
        if store == "redis_url":
            monkeypatch.setitem(Pipelines.submit.__kwdefaults__, "timeout", RELAXED_TIMEOUT_SECONDS)


def stores_with_real_timeouts(test: pytest.Function) -> set[str]:
    mark = test.get_closest_marker("real_timeouts")
    if mark is None:
        return set()
    return set(mark.args) or {test.callspec.params["store"]}


@pytest.fixture
def no_periodic_recheck(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("server.realtime.access_monitor.RECHECK_INTERVAL_SECONDS", 600.0)


TEST_SETTINGS = {
    "APP_ENV": "test",
    "HOST": "127.0.0.1",
    "PORT": "0",
    "BCRYPT_ROUNDS": "4",
    "RATE_LIMIT_AUTH": "off",
    "RATE_LIMIT_REFRESH": "off",
    "RATE_LIMIT_ACCOUNT": "off",
    "RATE_LIMIT_DEFAULT": "off",
    "LOG_LEVEL": "warning",
    "DRAIN_SECONDS": "2",
}


@pytest.fixture
def settings(stack: Stack, database_url: str, monkeypatch: pytest.MonkeyPatch) -> Settings:
    for name, value in {**TEST_SETTINGS, **stack.environment}.items():
        monkeypatch.setenv(name, value)
    return load()


_REDIS_DATABASES = itertools.cycle(range(1, 16))


@pytest.fixture
def isolated_stores(stack: Stack) -> dict[str, str]:
    return {
        "redis_url": f"{stack.valkey.url.rpartition('/')[0]}/{next(_REDIS_DATABASES)}",
        "mongodb_uri": stack.mongo.url.replace("/workspace?", f"/isolated_{secrets.token_hex(4)}?"),
    }


def environment_of(settings: dict[str, str]) -> dict[str, str]:
    """Return settings of ``make_server`` as environment variables of a process."""
    return {name.upper(): value for name, value in settings.items()}


def store_urls_of(stack: Stack) -> dict[str, str]:
    """Return settings for ``make_server`` that make a server use this stack."""
    return {name: stack.environment[name.upper()] for name in ("database_url", "redis_url", "mongodb_uri")}


class ProductServer(TestServer):
    """A test server with the HTTP runner of ``run.py server``."""

    async def _make_runner(self, **options: Any) -> HttpRunner:
        return HttpRunner(self.app, **options)


@pytest.fixture
async def make_server(settings: Settings) -> AsyncIterator[MakeServer]:
    running: list[tuple[TestServer, Any]] = []

    async def make(**override: Any) -> str:
        overridden = dataclasses.replace(settings, **override)
        stores = resources.connect(overridden)
        server = ProductServer(create_app(overridden, await stores.__aenter__()))
        await server.start_server(access_log=None)
        running.append((server, stores))
        return str(server.make_url("")).rstrip("/")

    yield make
    for server, stores in reversed(running):
        await server.close()
        await stores.__aexit__(None, None, None)


@pytest.fixture
async def server(make_server: MakeServer) -> str:
    return await make_server()


@pytest.fixture
async def http() -> AsyncIterator[aiohttp.ClientSession]:
    connector = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(connector=connector, auto_decompress=True) as session:
        yield session


@pytest.fixture
async def make_actor(http: aiohttp.ClientSession) -> AsyncIterator[MakeActor]:
    actors: list[Actor] = []

    async def make(name: str, base: str) -> Actor:
        actors.append(await Actor(http, base, name).register())
        return actors[-1]

    yield make
    await asyncio.gather(*(socket.close() for actor in actors for socket in actor.sockets))


@pytest.fixture
async def alice(server: str, make_actor: MakeActor) -> Actor:
    return await make_actor("Alice", server)


@pytest.fixture
async def bob(server: str, make_actor: MakeActor) -> Actor:
    return await make_actor("Bob", server)


@pytest.fixture
async def carol(server: str, make_actor: MakeActor) -> Actor:
    return await make_actor("Carol", server)


@pytest.fixture
def processes(stack: Stack, database_url: str, tmp_path: Path) -> Iterator[Processes]:
    with Processes(TEST_SETTINGS | stack.environment, tmp_path) as running:
        yield running


@pytest.fixture(scope="session")
def node() -> str:
    path = shutil.which("node")
    if path is None:
        pytest.skip("Node is missing: apt-get install nodejs")
    return path
