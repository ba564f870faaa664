"""Concurrent writes on one project: each gets its own response, and none fails as an outage of PostgreSQL."""

import ast
import asyncio
import contextlib
import itertools
import re
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from functools import partial
from typing import Any
from uuid import UUID

import aiohttp
import asyncpg
import pytest
from structlog.testing import capture_logs

from server import migrations, postgres
from server.auth import store as auth_store
from server.documents import store as documents_store
from server.errors import Unavailable
from server.postgres import Database, Executor
from server.projects import invitations_store
from server.settings import Settings
from tests.conftest import MakeServer
from tests.field.races import ACCOUNT_WRITES, PROJECT_WRITES, RaceScenario, ScenarioFactory, Write
from tests.test_sql import STORES
from tests.timeouts import WAIT_TIMEOUT_SECONDS

FULL_RACES = 200  # of each pair
AT_ONCE = 8
COLLIDED = "Concurrent writes conflicted; retry the request"
TIMED_OUT = "PostgreSQL did not answer in time"


@pytest.fixture
async def db(database_url: str) -> AsyncIterator[asyncpg.Connection]:
    connection = await asyncpg.connect(database_url)
    yield connection
    await connection.close()


@pytest.fixture
async def pool(database_url: str) -> AsyncIterator[Database]:
    database = await postgres.connect(database_url)
    yield database
    await database.close()


@pytest.fixture
async def worlds(
    db: asyncpg.Connection, settings: Settings, http: aiohttp.ClientSession, server: str
) -> ScenarioFactory:
    return await ScenarioFactory.at(server, db=db, settings=settings, http=http)


@pytest.mark.timeout(4 * 3600)  # the full form takes 40 minutes on an idle core
@pytest.mark.parametrize("moves", [PROJECT_WRITES, ACCOUNT_WRITES], ids=["on_a_project", "on_an_account"])
async def test_two_concurrent_writes_never_fail_as_an_outage(
    moves: tuple[Write, ...], worlds: ScenarioFactory, full: bool
) -> None:
    pairs = [*itertools.combinations_with_replacement(moves, 2)] * (FULL_RACES if full else 1)
    slots, creation = asyncio.Semaphore(AT_ONCE), asyncio.Lock()
    failures: Counter[str] = Counter()

    async def race(pair: tuple[Write, Write]) -> None:
        async with slots:
            async with creation:
                world = await worlds.make()
            await world.prepare(pair)
            answers = await asyncio.gather(*(move(world) for move in pair))
        for move, answer in zip(pair, answers, strict=True):
            if answer.status >= 500:
                names = [write.__name__ for write in pair]
                failures[f"{move.__name__} of {names}: {answer.status} {answer.body}"] += 1

    with capture_logs() as logged:
        await asyncio.gather(*map(race, pairs))
    assert not failures
    assert not [entry for entry in logged if entry["event"] == "write conflict, transaction retried"], (
        "hidden by the retry"
    )


# The lock order

WITHOUT_PROJECT_LOCK = {
    RaceScenario.edit,
    RaceScenario.write_document,
    RaceScenario.restore_document,
    RaceScenario.delete_invited,
}
WEAK_LOCK_WRITES = {  # KEY SHARE is enough, because the response for the project does not include their rows
    RaceScenario.invite,
    RaceScenario.withdraw_invitation,
    RaceScenario.create_document,
    RaceScenario.delete_document,
    RaceScenario.rename_document,
    RaceScenario.rename_other_document,
}
PROJECT_ROWS = {
    "members": "SELECT FROM members WHERE project_id = $1",
    "invitations": "SELECT FROM invitations WHERE project_id = $1",
    "workspaces": "SELECT FROM workspaces WHERE project_id = $1",
    "documents": "SELECT FROM documents WHERE workspace_id IN (SELECT id FROM workspaces WHERE project_id = $1)",
    "activity": "SELECT FROM activity WHERE project_id = $1",
}
DOCUMENT_ROWS = "SELECT FROM documents WHERE id = ANY ($1)"


class LockedRow:
    """A row that another session has locked, with queries for the locks of those who wait for it."""

    def __init__(self, holder: asyncpg.Connection, watcher: asyncpg.Connection) -> None:
        self.holder, self._watcher = holder, watcher

    async def waited_for(self, work: "asyncio.Future[Any]") -> None:
        """Return when the work waits for the row."""
        waiting = (
            "SELECT true FROM pg_locks WHERE NOT granted AND pg_backend_pid() = ANY (pg_blocking_pids(pid)) LIMIT 1"
        )
        async with asyncio.timeout(WAIT_TIMEOUT_SECONDS):
            while not await self.holder.fetchval(waiting):
                assert not work.done(), f"it did not wait: {work.result()}"
                await asyncio.sleep(0.005)

    async def locked(self, query: str, *values: Any) -> int:
        """Return how many of these rows are locked."""
        rows, unlocked = await self._watcher.fetch(query, *values), f"{query} FOR UPDATE SKIP LOCKED"
        return len(rows) - len(await self._watcher.fetch(unlocked, *values))


LockRow = Callable[..., AbstractAsyncContextManager[LockedRow]]


@pytest.fixture
async def hold(database_url: str) -> LockRow:
    """Return ``hold("projects", id)``, a context manager that locks a row."""

    @contextlib.asynccontextmanager
    async def lock(
        table: str, key: object, *, column: str = "id", strength: str = "UPDATE"
    ) -> AsyncIterator[LockedRow]:
        holder, watcher = await asyncpg.connect(database_url), await asyncpg.connect(database_url)
        try:
            async with holder.transaction():
                assert await holder.fetch(f"SELECT FROM {table} WHERE {column} = $1 FOR {strength}", key)
                yield LockedRow(holder, watcher)
        finally:
            await watcher.close()
            await holder.close()

    return lock


@pytest.mark.parametrize(
    "move", [move for move in PROJECT_WRITES if move not in WITHOUT_PROJECT_LOCK], ids=lambda move: move.__name__
)
async def test_a_write_locks_the_project_before_anything_in_it(
    move: Write, worlds: ScenarioFactory, hold: LockRow
) -> None:
    """It takes the strongest lock that it needs at once.

    Otherwise two writes that upgrade their locks, and a deletion that waits for both, would deadlock.
    """
    world = await worlds.make()
    async with hold(
        "projects", world.project, strength="UPDATE" if move in WEAK_LOCK_WRITES else "NO KEY UPDATE"
    ) as row:
        lockers = partial(row.holder.fetchval, "SELECT xmax FROM projects WHERE id = $1", world.project)
        holder = await lockers()
        writing = asyncio.ensure_future(move(world))
        await row.waited_for(writing)
        assert await lockers() == holder
        locked = {table: await row.locked(rows, world.project) for table, rows in PROJECT_ROWS.items()}
        assert not any(locked.values()), locked
    assert (await writing).status < 500


@pytest.mark.parametrize(
    "move", [RaceScenario.edit, RaceScenario.write_document, RaceScenario.restore_document], ids=lambda m: m.__name__
)
async def test_a_commit_of_an_edit_does_not_wait_for_the_project(
    move: Write, worlds: ScenarioFactory, hold: LockRow
) -> None:
    world = await worlds.make()
    await world.prepare([move])
    async with hold("projects", world.project):
        assert (await move(world)).status == 200


@pytest.mark.parametrize(
    "move",
    [RaceScenario.delete_workspace, RaceScenario.delete_project, RaceScenario.delete_owner],
    ids=lambda move: move.__name__,
)
async def test_a_deletion_locks_documents_in_the_order_of_edits(
    move: Write, worlds: ScenarioFactory, hold: LockRow, db: asyncpg.Connection
) -> None:
    world, other = await worlds.make(), await worlds.make()
    # The owner is now the only member of both projects, and may delete the account.
    actor = world.member if move is RaceScenario.delete_workspace else world.owner
    await db.execute("DELETE FROM members WHERE role <> 'OWNER' AND user_id <> $1", actor.id)
    await db.execute("UPDATE members SET user_id = $1 WHERE project_id = $2", world.owner.id, other.project)
    documents = sorted(world.documents + (other.documents if move is RaceScenario.delete_owner else []))
    async with hold("documents", documents[0]) as row:
        deleting = asyncio.ensure_future(move(world))
        await row.waited_for(deleting)
        assert await row.locked(DOCUMENT_ROWS, documents) == 1
    assert (await deleting).status == 204


async def test_renames_that_swap_two_paths_do_not_wait_for_each_other(worlds: ScenarioFactory, hold: LockRow) -> None:
    world = await worlds.make()
    async with hold("workspaces", world.workspace) as row:
        renames = [
            asyncio.ensure_future(move(world))
            for move in (RaceScenario.rename_document, RaceScenario.rename_other_document)
        ]
        for rename in renames:
            await row.waited_for(rename)
        assert await row.locked(DOCUMENT_ROWS, world.documents) == 0
    assert [(await rename).status for rename in renames] == [409, 409]


async def test_a_refresh_locks_its_session_before_its_token(worlds: ScenarioFactory, hold: LockRow) -> None:
    """The deletion of an account takes the locks in the same order."""
    world = await worlds.make()
    async with hold("sessions", UUID(world.member.id), column="user_id") as row:
        refreshing = asyncio.ensure_future(world.refresh_member())
        await row.waited_for(refreshing)
        tokens = "SELECT FROM refresh_tokens WHERE session_id IN (SELECT id FROM sessions WHERE user_id = $1)"
        assert await row.locked(tokens, UUID(world.member.id)) == 0
    assert (await refreshing).status == 200


async def test_a_log_is_shortened_after_its_document_is_locked(
    worlds: ScenarioFactory, hold: LockRow, pool: Database
) -> None:
    """The deletion of a document takes the locks in the same order."""
    world = await worlds.make()
    document = world.documents[0]
    async with hold("documents", document) as row:
        shortening = asyncio.ensure_future(
            documents_store.shorten_log(pool, document=document, version=1, grace_seconds=0)
        )
        await row.waited_for(shortening)
        assert await row.locked("SELECT FROM document_updates WHERE document_id = $1", document) == 0
    await shortening


async def test_housekeeping_skips_locked_rows(
    worlds: ScenarioFactory, hold: LockRow, pool: Database, db: asyncpg.Connection
) -> None:
    world = await worlds.make()
    users = [UUID(actor.id) for actor in (world.member, world.owner)]
    await db.execute("UPDATE invitations SET expires_at = '2020-01-01' WHERE project_id = $1", world.project)
    await db.execute("UPDATE sessions SET expires_at = '2020-01-01' WHERE user_id = ANY ($1)", users)
    async with hold("invitations", world.invitation):
        assert await invitations_store.delete_expired_invitations(pool, retention_days=30, limit=1000) >= 1
    async with hold("sessions", users[0], column="user_id"):
        while await auth_store.delete_expired_sessions(pool, retention_days=7):
            pass
    assert await db.fetchval("SELECT count(*) FROM invitations WHERE project_id = $1", world.project) == 1
    assert await db.fetchval("SELECT count(*) FROM sessions WHERE user_id = ANY ($1)", users) == 1


WRITE = re.compile(
    r"\b(?:INSERT INTO|UPDATE|DELETE FROM) (projects|members|invitations|activity|workspaces|documents)\b"
)
PROJECT_LOCK = re.compile(
    r"\s*WITH (?:joiner AS MATERIALIZED \(\s*SELECT \w+ FROM users WHERE id = \$\d FOR SHARE\s*\), )?"
    r"project AS MATERIALIZED \(\s*SELECT (?:p\.)?id FROM [^()]*FOR (NO KEY UPDATE|KEY SHARE)(?: OF p)?\s*\)"
)
TABLES_WITH_PROJECT_TRIGGER = {"members", "workspaces"}  # their triggers update the project
EXCEPTIONS = {
    "create_workspace": "its rows are new; a trigger locks the project before the foreign key does",
    "promote_to_owner": "runs in the transaction of demote_owner, which has locked the project",
    "delete_expired_invitations": "skips locked rows",
    "append": "locks documents only, in the order of their ids",
    "append_named": "locks one document only",
    "correct_size": "locks one document only",
    "keep_snapshot": "locks one document only",
    "set_email_key": "locks one invitation only",
    "name_pauses": "locks documents only, and skips locked rows",
}


def writes() -> Iterator[tuple[str, str, list[str]]]:
    """Yield function name, text and tables of each statement that writes to a table of projects."""
    for path in STORES:
        for function in ast.parse(path.read_text()).body:
            for node in ast.walk(function):
                if isinstance(function, ast.AsyncFunctionDef) and isinstance(node, ast.Constant):
                    tables = WRITE.findall(str(node.value))
                    if tables:
                        yield function.name, str(node.value), tables


def lock_of(query: str, tables: list[str]) -> str | None:
    """Return the lock that a statement takes on the project first, or None if it takes none or another one before."""
    if tables[0] == "projects":
        return "NO KEY UPDATE"
    match = PROJECT_LOCK.match(query)
    return match and match.group(1)


def test_every_statement_takes_the_locks_in_order() -> None:
    locks = {name: (lock_of(query, tables), tables) for name, query, tables in writes()}
    assert {name for name, (lock, _) in locks.items() if lock is None} == set(EXCEPTIONS)
    weak = {
        name
        for name, (lock, tables) in locks.items()
        if lock == "KEY SHARE" and TABLES_WITH_PROJECT_TRIGGER & set(tables)
    }
    assert not weak, "they take a stronger lock later"
    assert len(locks) > 2 * len(EXCEPTIONS)


def test_the_check_detects_a_statement_that_locks_another_row_first() -> None:
    for query in (
        "UPDATE members SET role = 'VIEWER' WHERE id = $1",
        "WITH gone AS (DELETE FROM documents WHERE id = $1), project AS MATERIALIZED (SELECT id FROM projects WHERE"
        " id = $2 FOR KEY SHARE) SELECT",
        "WITH project AS MATERIALIZED (SELECT id FROM projects WHERE id = $1) DELETE FROM members USING project",
    ):
        assert lock_of(query, WRITE.findall(query)) is None


# Collisions that remain


@pytest.fixture
async def fast_deadlock_url(make_database: Callable[[], str]) -> str:
    """Return a migrated database whose deadlock timeout is 50 ms instead of 1 s."""
    url = make_database()
    migrations.apply(url)
    connection = await asyncpg.connect(url)
    await connection.execute(
        "DO $$ BEGIN EXECUTE format('ALTER DATABASE %I SET deadlock_timeout = 50', current_database()); END $$"
    )
    await connection.close()
    return url


@dataclass
class ConflictingSession:
    """A session that locks rows in another order; PostgreSQL cancels the server's side of a deadlock."""

    connection: asyncpg.Connection
    world: RaceScenario

    @classmethod
    @contextlib.asynccontextmanager
    async def at(
        cls, url: str, server: str, settings: Settings, http: aiohttp.ClientSession
    ) -> AsyncIterator["ConflictingSession"]:
        connection = await asyncpg.connect(url, server_settings={"deadlock_timeout": "1min"})
        world = await (await ScenarioFactory.at(server, db=connection, settings=settings, http=http)).make()
        yield cls(connection, world)
        await connection.close()


@pytest.mark.parametrize(
    ("move", "first", "then"),
    [
        (
            RaceScenario.rename_owner,
            "SELECT FROM projects WHERE id = $1 FOR UPDATE",
            "SELECT FROM users WHERE id IN (SELECT user_id FROM members WHERE project_id = $1) FOR UPDATE",
        ),
        (
            RaceScenario.transfer,
            "SELECT FROM members WHERE project_id = $1 AND role <> 'OWNER' FOR UPDATE",
            "SELECT FROM projects WHERE id = $1 FOR UPDATE",
        ),
    ],
    ids=["a_statement", "a_transaction"],
)
async def test_a_server_retries_a_write_after_a_deadlock_with_another_session(
    move: Write,
    first: str,
    then: str,
    fast_deadlock_url: str,
    make_server: MakeServer,
    isolated_stores: dict[str, str],
    settings: Settings,
    http: aiohttp.ClientSession,
) -> None:
    server = await make_server(database_url=fast_deadlock_url, **isolated_stores)
    async with ConflictingSession.at(fast_deadlock_url, server, settings, http) as conflicting:
        async with conflicting.connection.transaction():
            await conflicting.connection.execute(first, conflicting.world.project)
            writing = asyncio.ensure_future(move(conflicting.world))
            await LockedRow(conflicting.connection, conflicting.connection).waited_for(writing)
            await conflicting.connection.execute(then, conflicting.world.project)  # returns: the server was rolled back
        assert (await writing).status == 200


async def test_a_second_collision_is_reported_as_a_collision(pool: Database) -> None:
    for error in ("serialization_failure", "deadlock_detected"):
        with pytest.raises(Unavailable) as raised:
            await pool.execute(f"DO $$ BEGIN RAISE {error}; END $$")
        assert raised.value.detail == COLLIDED
        assert raised.value.retry_after


async def test_a_transaction_that_collides_is_retried_once_from_its_start(pool: Database) -> None:
    attempts = 0

    async def work(transaction: Executor, *, collisions: int) -> int:
        nonlocal attempts
        attempts += 1
        await transaction.execute("CREATE TEMPORARY TABLE made_once (n integer) ON COMMIT DROP")
        if attempts <= collisions:
            await transaction.execute("DO $$ BEGIN RAISE deadlock_detected; END $$")
        return attempts

    assert await pool.transact(partial(work, collisions=1)) == 2
    attempts = 0
    with pytest.raises(Unavailable) as raised:
        await pool.transact(partial(work, collisions=5))
    assert (raised.value.detail, attempts) == (COLLIDED, 2)


# A slow store


@pytest.mark.real_timeouts("database_url")
async def test_a_slow_write_is_not_reported_as_an_outage(worlds: ScenarioFactory, hold: LockRow) -> None:
    """Neither a slow statement nor a slow transaction is reported as an outage."""
    world = await worlds.make()
    async with hold("projects", world.project):
        answers = await asyncio.gather(world.rename_project(), world.transfer())
    for answer in answers:
        assert (answer.status, answer.code, answer["detail"]) == (503, "unavailable", TIMED_OUT)
        assert int(answer.headers["Retry-After"]) > 0


async def test_every_timeout_of_a_statement_is_reported_as_a_timeout(pool: Database) -> None:
    for error in ("query_canceled", "lock_not_available"):
        with pytest.raises(Unavailable) as raised:
            await pool.execute(f"DO $$ BEGIN RAISE {error}; END $$")
        assert raised.value.detail == TIMED_OUT
