"""Writes on one project at once: each is answered for what it is. None ends as an outage of PostgreSQL."""

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
from tests.field.races import ON_A_PROJECT, ON_AN_ACCOUNT, Move, World, Worlds
from tests.patience import PATIENCE_SECONDS
from tests.test_sql import STORES

FULL_RACES = 200  # of each pair
AT_ONCE = 8
COLLIDED = "Concurrent writes conflicted; retry the request"
SLOW = "PostgreSQL did not answer in time"


@pytest.fixture
async def db(database_url: str) -> AsyncIterator[asyncpg.Connection]:
    connection = await asyncpg.connect(database_url)
    yield connection
    await connection.close()


@pytest.fixture
async def pool(database_url: str) -> AsyncIterator[Database]:
    made = await postgres.connect(database_url)
    yield made
    await made.close()


@pytest.fixture
async def worlds(db: asyncpg.Connection, settings: Settings, http: aiohttp.ClientSession, server: str) -> Worlds:
    return await Worlds.at(server, db=db, settings=settings, http=http)


@pytest.mark.timeout(4 * 3600)  # the full form: 40 minutes of an idle core
@pytest.mark.parametrize("moves", [ON_A_PROJECT, ON_AN_ACCOUNT], ids=["on_a_project", "on_an_account"])
async def test_no_two_writes_at_once_end_as_an_outage(moves: tuple[Move, ...], worlds: Worlds, full: bool) -> None:
    pairs = [*itertools.combinations_with_replacement(moves, 2)] * (FULL_RACES if full else 1)
    places, turns = asyncio.Semaphore(AT_ONCE), asyncio.Lock()
    failures: Counter[str] = Counter()

    async def race(pair: tuple[Move, Move]) -> None:
        async with places:
            async with turns:
                world = await worlds.make()
            await world.prepare(pair)
            answers = await asyncio.gather(*(move(world) for move in pair))
        for move, answer in zip(pair, answers, strict=True):
            if answer.status >= 500:
                names = [each.__name__ for each in pair]
                failures[f"{move.__name__} of {names}: {answer.status} {answer.body}"] += 1

    with capture_logs() as logged:
        await asyncio.gather(*map(race, pairs))
    assert not failures
    assert not [entry for entry in logged if entry["event"] == "concurrent writes collided"], "hidden by the retry"


# The lock order

APART = {World.edit, World.write_document, World.restore_document, World.delete_invited}
UNSEEN = {  # in what the project shows
    World.invite,
    World.withdraw_invitation,
    World.create_document,
    World.delete_document,
    World.rename_document,
    World.rename_other_document,
}
IN_A_PROJECT = {
    "members": "SELECT FROM members WHERE project_id = $1",
    "invitations": "SELECT FROM invitations WHERE project_id = $1",
    "workspaces": "SELECT FROM workspaces WHERE project_id = $1",
    "documents": "SELECT FROM documents WHERE workspace_id IN (SELECT id FROM workspaces WHERE project_id = $1)",
    "activity": "SELECT FROM activity WHERE project_id = $1",
}
DOCUMENTS = "SELECT FROM documents WHERE id = ANY ($1)"


class Held:
    """A row that another session has locked, and what others lock while they wait for it."""

    def __init__(self, holder: asyncpg.Connection, watcher: asyncpg.Connection) -> None:
        self.holder, self._watcher = holder, watcher

    async def waited_for(self, work: "asyncio.Future[Any]") -> None:
        """Returns when the work waits for the row."""
        waiting = (
            "SELECT true FROM pg_locks WHERE NOT granted AND pg_backend_pid() = ANY (pg_blocking_pids(pid)) LIMIT 1"
        )
        async with asyncio.timeout(PATIENCE_SECONDS):
            while not await self.holder.fetchval(waiting):
                assert not work.done(), f"it did not wait: {work.result()}"
                await asyncio.sleep(0.005)

    async def locked(self, query: str, *values: Any) -> int:
        """How many of these rows are locked."""
        every, free = await self._watcher.fetch(query, *values), f"{query} FOR UPDATE SKIP LOCKED"
        return len(every) - len(await self._watcher.fetch(free, *values))


Hold = Callable[..., AbstractAsyncContextManager[Held]]


@pytest.fixture
async def hold(database_url: str) -> Hold:
    """``hold("projects", id)`` locks a row until it is left."""

    @contextlib.asynccontextmanager
    async def held(table: str, key: object, *, column: str = "id", strength: str = "UPDATE") -> AsyncIterator[Held]:
        holder, watcher = await asyncpg.connect(database_url), await asyncpg.connect(database_url)
        try:
            async with holder.transaction():
                assert await holder.fetch(f"SELECT FROM {table} WHERE {column} = $1 FOR {strength}", key)
                yield Held(holder, watcher)
        finally:
            await watcher.close()
            await holder.close()

    return held


@pytest.mark.parametrize("move", [move for move in ON_A_PROJECT if move not in APART], ids=lambda move: move.__name__)
async def test_a_write_locks_the_project_before_anything_in_it(move: Move, worlds: Worlds, hold: Hold) -> None:
    """And at once as strongly as it will need: two that raise a lock, and a deletion that waits for both, would wait
    for each other."""
    world = await worlds.make()
    async with hold("projects", world.project, strength="UPDATE" if move in UNSEEN else "NO KEY UPDATE") as held:
        lockers = partial(held.holder.fetchval, "SELECT xmax FROM projects WHERE id = $1", world.project)
        holder = await lockers()
        writing = asyncio.ensure_future(move(world))
        await held.waited_for(writing)
        assert await lockers() == holder
        locked = {table: await held.locked(rows, world.project) for table, rows in IN_A_PROJECT.items()}
        assert not any(locked.values()), locked
    assert (await writing).status < 500


@pytest.mark.parametrize("move", [World.edit, World.write_document, World.restore_document], ids=lambda m: m.__name__)
async def test_a_commit_of_an_edit_waits_for_no_project(move: Move, worlds: Worlds, hold: Hold) -> None:
    world = await worlds.make()
    await world.prepare([move])
    async with hold("projects", world.project):
        assert (await move(world)).status == 200


@pytest.mark.parametrize(
    "move", [World.delete_workspace, World.delete_project, World.delete_owner], ids=lambda move: move.__name__
)
async def test_a_deletion_locks_documents_in_the_order_of_edits(
    move: Move, worlds: Worlds, hold: Hold, db: asyncpg.Connection
) -> None:
    world, other = await worlds.make(), await worlds.make()
    # Both projects are the owner's alone now, who may delete the account.
    actor = world.member if move is World.delete_workspace else world.owner
    await db.execute("DELETE FROM members WHERE role <> 'OWNER' AND user_id <> $1", actor.id)
    await db.execute("UPDATE members SET user_id = $1 WHERE project_id = $2", world.owner.id, other.project)
    documents = sorted(world.documents + (other.documents if move is World.delete_owner else []))
    async with hold("documents", documents[0]) as held:
        deleting = asyncio.ensure_future(move(world))
        await held.waited_for(deleting)
        assert await held.locked(DOCUMENTS, documents) == 1
    assert (await deleting).status == 204


async def test_renames_that_swap_two_paths_do_not_wait_for_each_other(worlds: Worlds, hold: Hold) -> None:
    world = await worlds.make()
    async with hold("workspaces", world.workspace) as held:
        renames = [asyncio.ensure_future(move(world)) for move in (World.rename_document, World.rename_other_document)]
        for rename in renames:
            await held.waited_for(rename)
        assert await held.locked(DOCUMENTS, world.documents) == 0
    assert [(await rename).status for rename in renames] == [409, 409]


async def test_a_refresh_locks_its_session_before_its_token(worlds: Worlds, hold: Hold) -> None:
    """As the deletion of the account does."""
    world = await worlds.make()
    async with hold("sessions", UUID(world.member.id), column="user_id") as held:
        refreshing = asyncio.ensure_future(world.refresh_member())
        await held.waited_for(refreshing)
        tokens = "SELECT FROM refresh_tokens WHERE session_id IN (SELECT id FROM sessions WHERE user_id = $1)"
        assert await held.locked(tokens, UUID(world.member.id)) == 0
    assert (await refreshing).status == 200


async def test_a_log_is_shortened_after_its_document_is_locked(worlds: Worlds, hold: Hold, pool: Database) -> None:
    """As the deletion of the document does."""
    world = await worlds.make()
    document = world.documents[0]
    async with hold("documents", document) as held:
        shortening = asyncio.ensure_future(
            documents_store.shorten_log(pool, document=document, version=1, grace_seconds=0)
        )
        await held.waited_for(shortening)
        assert await held.locked("SELECT FROM document_updates WHERE document_id = $1", document) == 0
    await shortening


async def test_housekeeping_skips_locked_rows(
    worlds: Worlds, hold: Hold, pool: Database, db: asyncpg.Connection
) -> None:
    world = await worlds.make()
    users = [UUID(actor.id) for actor in (world.member, world.owner)]
    await db.execute("UPDATE invitations SET expires_at = '2020-01-01' WHERE project_id = $1", world.project)
    await db.execute("UPDATE sessions SET expires_at = '2020-01-01' WHERE user_id = ANY ($1)", users)
    async with hold("invitations", world.invitation):
        assert await invitations_store.forget(pool, keep_days=30, most=1000) >= 1
    async with hold("sessions", users[0], column="user_id"):
        while await auth_store.forget_old_sessions(pool, keep_days=7):
            pass
    assert await db.fetchval("SELECT count(*) FROM invitations WHERE project_id = $1", world.project) == 1
    assert await db.fetchval("SELECT count(*) FROM sessions WHERE user_id = ANY ($1)", users) == 1


WRITE = re.compile(
    r"\b(?:INSERT INTO|UPDATE|DELETE FROM) (projects|members|invitations|activity|workspaces|documents)\b"
)
FIRST = re.compile(
    r"\s*WITH (?:joiner AS MATERIALIZED \(\s*SELECT \w+ FROM users WHERE id = \$\d FOR SHARE\s*\), )?"
    r"project AS MATERIALIZED \(\s*SELECT (?:p\.)?id FROM [^()]*FOR (NO KEY UPDATE|KEY SHARE)(?: OF p)?\s*\)"
)
SHOWN = {"members", "workspaces"}  # their triggers change the project
EXPLAINED = {
    "create_workspace": "its rows are new; a trigger locks the project before the foreign key does",
    "step_up": "in the transaction of step_down, which has locked the project",
    "forget": "skips what is locked",
    "append": "documents only, in the order of their ids",
    "append_named": "one document only",
    "correct_size": "one document only",
    "keep_snapshot": "one document only",
    "give_key": "one invitation only",
    "name_pauses": "documents only, and skips what is locked",
}


def writes() -> Iterator[tuple[str, str, list[str]]]:
    """Name, text and tables of each statement that writes what belongs to a project."""
    for path in STORES:
        for function in ast.parse(path.read_text()).body:
            for node in ast.walk(function):
                if isinstance(function, ast.AsyncFunctionDef) and isinstance(node, ast.Constant):
                    tables = WRITE.findall(str(node.value))
                    if tables:
                        yield function.name, str(node.value), tables


def lock_of(query: str, tables: list[str]) -> str | None:
    """The lock that it takes on the project first; None where it takes another lock before, or none."""
    if tables[0] == "projects":
        return "NO KEY UPDATE"
    found = FIRST.match(query)
    return found and found.group(1)


def test_every_statement_takes_the_locks_in_order() -> None:
    found = {name: (lock_of(query, tables), tables) for name, query, tables in writes()}
    assert {name for name, (lock, _) in found.items() if lock is None} == set(EXPLAINED)
    weak = {name for name, (lock, tables) in found.items() if lock == "KEY SHARE" and SHOWN & set(tables)}
    assert not weak, "a stronger lock would be taken later"
    assert len(found) > 2 * len(EXPLAINED)


def test_the_check_sees_a_statement_that_locks_something_else_first() -> None:
    for query in (
        "UPDATE members SET role = 'VIEWER' WHERE id = $1",
        "WITH gone AS (DELETE FROM documents WHERE id = $1), project AS MATERIALIZED (SELECT id FROM projects WHERE"
        " id = $2 FOR KEY SHARE) SELECT",
        "WITH project AS MATERIALIZED (SELECT id FROM projects WHERE id = $1) DELETE FROM members USING project",
    ):
        assert lock_of(query, WRITE.findall(query)) is None


# Collisions that remain


@pytest.fixture
async def alert(make_database: Callable[[], str]) -> str:
    """A migrated database in which PostgreSQL looks for deadlocks at once, not after a second."""
    url = make_database()
    migrations.apply(url)
    connection = await asyncpg.connect(url)
    await connection.execute(
        "DO $$ BEGIN EXECUTE format('ALTER DATABASE %I SET deadlock_timeout = 50', current_database()); END $$"
    )
    await connection.close()
    return url


@dataclass
class Rival:
    """A session that locks rows in an order of its own; of a deadlock the server is the victim."""

    connection: asyncpg.Connection
    world: World

    @classmethod
    @contextlib.asynccontextmanager
    async def at(cls, url: str, server: str, settings: Settings, http: aiohttp.ClientSession) -> AsyncIterator["Rival"]:
        connection = await asyncpg.connect(url, server_settings={"deadlock_timeout": "1min"})
        world = await (await Worlds.at(server, db=connection, settings=settings, http=http)).make()
        yield cls(connection, world)
        await connection.close()


@pytest.mark.parametrize(
    ("move", "first", "then"),
    [
        (
            World.rename_owner,
            "SELECT FROM projects WHERE id = $1 FOR UPDATE",
            "SELECT FROM users WHERE id IN (SELECT user_id FROM members WHERE project_id = $1) FOR UPDATE",
        ),
        (
            World.transfer,
            "SELECT FROM members WHERE project_id = $1 AND role <> 'OWNER' FOR UPDATE",
            "SELECT FROM projects WHERE id = $1 FOR UPDATE",
        ),
    ],
    ids=["a_statement", "a_transaction"],
)
async def test_a_deadlock_with_another_session_is_retried_inside(
    move: Move,
    first: str,
    then: str,
    alert: str,
    make_server: MakeServer,
    quiet: dict[str, str],
    settings: Settings,
    http: aiohttp.ClientSession,
) -> None:
    server = await make_server(database_url=alert, **quiet)
    async with Rival.at(alert, server, settings, http) as rival:
        async with rival.connection.transaction():
            await rival.connection.execute(first, rival.world.project)
            writing = asyncio.ensure_future(move(rival.world))
            await Held(rival.connection, rival.connection).waited_for(writing)
            await rival.connection.execute(then, rival.world.project)  # returns: the server was rolled back
        assert (await writing).status == 200


async def test_a_second_collision_is_reported_as_one(pool: Database) -> None:
    for error in ("serialization_failure", "deadlock_detected"):
        with pytest.raises(Unavailable) as raised:
            await pool.execute(f"DO $$ BEGIN RAISE {error}; END $$")
        assert raised.value.detail == COLLIDED
        assert raised.value.retry_after


async def test_a_transaction_that_collides_runs_again_from_its_beginning_once(pool: Database) -> None:
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


@pytest.mark.hurried("database_url")
async def test_a_slow_write_is_not_reported_as_an_outage(worlds: Worlds, hold: Hold) -> None:
    """A statement, and a transaction."""
    world = await worlds.make()
    async with hold("projects", world.project):
        answers = await asyncio.gather(world.rename_project(), world.transfer())
    for answer in answers:
        assert (answer.status, answer.code, answer["detail"]) == (503, "unavailable", SLOW)
        assert int(answer.headers["Retry-After"]) > 0


async def test_every_timeout_of_a_statement_is_reported_as_slowness(pool: Database) -> None:
    for error in ("query_canceled", "lock_not_available"):
        with pytest.raises(Unavailable) as raised:
            await pool.execute(f"DO $$ BEGIN RAISE {error}; END $$")
        assert raised.value.detail == SLOW
