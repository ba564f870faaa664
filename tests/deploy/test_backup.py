"""Backup and restore, with the scripts that operators run and PostgreSQL's own tools."""

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from urllib.parse import urlsplit

import psycopg
import pymongo
import pytest

from server import migrations
from server.devstack.stack import Stack
from tests.conftest import MakeActor, MakeServer

ROOT = Path(__file__).parents[2]
TABLES = "SELECT tablename FROM pg_tables WHERE schemaname = 'public' ORDER BY tablename"


@pytest.fixture
def tools(stack: Stack) -> str:
    """A PATH with the tools of the embedded PostgreSQL's own version."""
    return f"{stack.postgres.programs}:{os.environ['PATH']}"


def run(script: str, folder: Path, url: str, tools: str, **beside: str) -> subprocess.CompletedProcess[str]:
    environment = {"PATH": tools, "DATABASE_URL": url, "BACKUP_MONGO": "off", **beside}
    command = [str(ROOT / "scripts/deploy" / script), str(folder)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)


def contents(url: str) -> dict[str, list[str]]:
    with psycopg.connect(url) as connection:
        tables = [name for (name,) in connection.execute(TABLES)]
        return {
            name: sorted(row for (row,) in connection.execute(f'SELECT t::text FROM "{name}" t')) for name in tables
        }


async def test_what_was_saved_comes_back_and_people_go_on_working(
    database_url: str,
    make_database: Callable[[], str],
    make_server: MakeServer,
    make_actor: MakeActor,
    tools: str,
    tmp_path: Path,
) -> None:
    living, fresh = make_database(), make_database()
    migrations.apply(living)
    alice = await make_actor("Alice", await make_server(database_url=living))
    made = await alice.post("/projects", {"name": "Kept", "settings": {"tabs": 4}})
    saved = run("backup", tmp_path / "saved", living, tools)
    assert saved.returncode == 0, saved.stderr
    await alice.post("/projects", {"name": "Made after the backup"})

    restored = run("restore", tmp_path / "saved", fresh, tools)
    assert restored.returncode == 0, restored.stderr
    base = await make_server(database_url=fresh)
    back = await alice.at(base).log_in()
    shown = await back.get("/projects")
    assert [each["name"] for each in shown["items"]] == ["Kept"]
    assert shown["items"][0]["settings"] == {"tabs": 4}
    again = await back.patch(f"/projects/{made['id']}", {"name": "Changed after the restore"})
    assert again.status == 200


def test_every_table_comes_back_row_by_row(make_database: Callable[[], str], tools: str, tmp_path: Path) -> None:
    living, fresh = make_database(), make_database()
    migrations.apply(living)
    with psycopg.connect(living) as connection:
        connection.execute("INSERT INTO users (email, name, password_hash) VALUES ('a@example.org', 'Ada', 'x')")
    run("backup", tmp_path / "saved", living, tools)
    restored = run("restore", tmp_path / "saved", fresh, tools)
    assert restored.returncode == 0, restored.stderr
    assert contents(fresh) == contents(living)
    assert migrations.pending(fresh) == []


def test_a_backup_is_readable_by_its_owner_alone(make_database: Callable[[], str], tools: str, tmp_path: Path) -> None:
    run("backup", tmp_path / "saved", make_database(), tools)
    made = [tmp_path / "saved", *(tmp_path / "saved").iterdir()]
    assert len(made) == 3
    assert [path.stat().st_mode & 0o077 for path in made] == [0, 0, 0]


def test_restoring_over_a_living_database_is_refused(database_url: str, tools: str, tmp_path: Path) -> None:
    run("backup", tmp_path / "saved", database_url, tools)
    before = contents(database_url)
    refused = run("restore", tmp_path / "saved", database_url, tools)
    assert refused.returncode == 1
    assert "restore into an empty one" in refused.stderr
    assert contents(database_url) == before


def test_a_damaged_backup_is_refused(make_database: Callable[[], str], tools: str, tmp_path: Path) -> None:
    run("backup", tmp_path / "saved", make_database(), tools)
    dump = tmp_path / "saved" / "postgres.dump"
    dump.write_bytes(dump.read_bytes()[:-1])
    refused = run("restore", tmp_path / "saved", make_database(), tools)
    assert refused.returncode == 1
    assert "does not match its MANIFEST" in refused.stderr


def test_a_backup_that_fails_leaves_nothing_that_looks_like_one(tools: str, tmp_path: Path) -> None:
    failed = run("backup", tmp_path / "saved", "postgresql://nobody@127.0.0.1:1/nothing", tools)
    assert failed.returncode != 0
    assert not (tmp_path / "saved").exists()


STUB = """#!/bin/sh
# In place of MongoDB's tool: says what it was told, without the address among its arguments.
for word; do case $word in
  --config=*) cat "${word#--config=}" >>"$TOLD" ;;
  --archive) if [ "${0##*/}" = mongodump ]; then echo archive; else cat >>"$TOLD"; fi ;;
  *) echo "$word" >>"$TOLD" ;;
esac; done
"""


@pytest.fixture
def told(tmp_path: Path) -> Path:
    """What mongodump and mongorestore, which are not here, have been told."""
    for name in ("mongodump", "mongorestore"):
        (tmp_path / name).write_text(STUB)
        (tmp_path / name).chmod(0o755)
    return tmp_path / "told"


def test_mongodb_is_saved_too_and_comes_back_under_another_name_into_nothing_but_an_empty_database(
    stack: Stack, make_database: Callable[[], str], tools: str, told: Path, tmp_path: Path
) -> None:
    tools = f"{tmp_path}:{tools}"
    other = stack.mongo.url.replace("/workspace?", "/restored?")
    beside = {"BACKUP_MONGO": "on", "TOLD": str(told), "PYTHON": sys.executable}
    saved = run("backup", tmp_path / "saved", make_database(), tools, MONGODB_URI=stack.mongo.url, **beside)
    assert saved.returncode == 0, saved.stderr
    assert f'uri: "{stack.mongo.url}"' in told.read_text()

    told.unlink()
    restored = run("restore", tmp_path / "saved", make_database(), tools, MONGODB_URI=other, **beside)
    assert restored.returncode == 0, restored.stderr
    words = told.read_text().splitlines()
    assert {"--nsInclude=workspace.*", "--nsFrom=workspace.*", "--nsTo=restored.*"} <= set(words)
    [address] = [word for word in words if word.startswith("uri:")]
    assert "restored" not in address
    assert "directConnection=true" in address

    told.unlink()
    with pymongo.MongoClient(other) as client:
        client.restored.jobs.insert_one({"_id": "living"})
    fresh = make_database()
    refused = run("restore", tmp_path / "saved", fresh, tools, MONGODB_URI=other, **beside)
    assert refused.returncode == 1
    assert "restore into an empty one" in refused.stderr
    assert not told.exists()
    assert contents(fresh) == {}, "PostgreSQL was left alone, too"


@pytest.mark.parametrize(
    ("uri", "server"),
    [
        ("mongodb://app:p%40ss@mongo:27017/app?authSource=admin&journal=true", "mongodb://app:p%40ss@mongo:27017/?authSource=admin&journal=true"),
        ("mongodb://app:secret@a:1,b:2/app", "mongodb://app:secret@a:1,b:2/?authSource=app"),
        ("mongodb+srv://mongo/app", "mongodb+srv://mongo/"),
    ],
)  # fmt: skip
def test_the_server_of_an_address_still_knows_its_user(uri: str, server: str) -> None:
    tool = ROOT / "scripts/deploy/mongo_address.py"
    answers = [
        subprocess.run([sys.executable, str(tool), what], env={"MONGODB_URI": uri}, capture_output=True, text=True)
        for what in ("server", "database")
    ]
    assert [answer.stdout.strip() for answer in answers] == [server, "app"]


def test_without_mongodump_it_says_so_before_it_begins(database_url: str, tools: str, tmp_path: Path) -> None:
    if any((Path(folder) / "mongodump").exists() for folder in tools.split(":")):
        pytest.skip("mongodump is here")
    failed = run("backup", tmp_path / "saved", database_url, tools, BACKUP_MONGO="on", MONGODB_URI="mongodb://x/y")
    assert failed.returncode == 1
    assert "mongodump is missing" in failed.stderr
    assert not (tmp_path / "saved").exists()


DOCKER = """#!/bin/sh
# In place of docker compose: runs here what it is to run in a container, with what the container has.
echo "$*" >>"$TOLD"
[ "$1" = compose ] || exit 1
[ -f "${COMPOSE_FILE:-docker-compose.yml}" ] || exit 1
case "$2 $3 $4" in
"exec -T postgres" | "exec -T mongo" | "exec -T valkey") shift 4; exec env MONGODB_URI= DATABASE_URL= "$@" ;;
"run --rm --no-deps")
    [ "$5 $6 $7 $8" = "-T --entrypoint python migrate" ] || exit 1
    shift 8
    MONGODB_URI=$IN_MIGRATE exec "$PYTHON" "$@" ;;
"up --detach "*) exit 0 ;;
esac
exit 1
"""


def commands_of(page: str, *, with_compose: bool) -> list[str]:
    """The shell commands that the page shows, block by block."""
    blocks = re.findall(r"```sh\n(.*?)```", (ROOT / "scripts/deploy" / page).read_text(), re.DOTALL)
    return [block for block in blocks if ("compose" in block) == with_compose]


def test_the_commands_for_compose_save_and_bring_back_what_its_stores_hold(
    stack: Stack, make_database: Callable[[], str], tools: str, told: Path, tmp_path: Path
) -> None:
    (tmp_path / "docker").write_text(DOCKER)
    (tmp_path / "valkey-cli").write_text(STUB)
    for name in ("docker", "valkey-cli"):
        (tmp_path / name).chmod(0o755)
    checkout, saved = tmp_path / "an operator's checkout", tmp_path / "backups"
    saved.mkdir()
    shutil.copytree(ROOT / "scripts/deploy", checkout / "scripts/deploy")
    shutil.copy(ROOT / "docker-compose.yml", checkout)
    living, fresh = make_database(), make_database()
    migrations.apply(living)
    with psycopg.connect(living) as connection:
        connection.execute(
            "INSERT INTO users (email, email_key, name, password_hash) VALUES ('a@b', 'a@b', 'Ada', 'x')"
        )

    def follow(commands: str, url: str, mongo: str) -> subprocess.CompletedProcess[str]:
        parts = urlsplit(url)
        container = {"POSTGRES_USER": parts.username, "POSTGRES_PASSWORD": parts.password, "PASSWORD": "secret"}
        container |= {"PGHOST": parts.hostname, "PGPORT": str(parts.port), "POSTGRES_DB": parts.path[1:]}
        machine = {"PATH": f"{tmp_path}:{tools}", "TOLD": str(told), "PYTHON": sys.executable, "IN_MIGRATE": mongo}
        commands = commands.replace("/backups", str(saved)).replace("$(date +%F)", "2026-11-24")
        return subprocess.run(
            ["bash", "-eu", "-c", commands], cwd=checkout, env=container | machine, capture_output=True, text=True
        )

    backing_up, restoring = commands_of("backup.md", with_compose=True)
    made = follow(backing_up, living, stack.mongo.url)
    assert made.returncode == 0, made.stderr
    assert {path.name for path in (saved / "2026-11-24").iterdir()} == {
        "MANIFEST",
        "mongo.archive",
        "mongo.database",
        "postgres.dump",
    }
    back = follow(restoring, fresh, stack.mongo.url.replace("/workspace?", "/elsewhere?"))
    assert back.returncode == 0, back.stderr
    assert contents(fresh) == contents(living)
    lines = told.read_text().splitlines()
    assert {"archive", "--nsTo=elsewhere.*", "FLUSHALL"} <= set(lines)
    assert lines[-1] == "compose up --detach"
    asked = [line for line in lines if line.startswith("compose ")]
    assert urlsplit(living).password not in "".join(asked)
    assert "mongodb://" not in "".join(asked)

    again = follow(restoring, fresh, stack.mongo.url)
    assert "restore into an empty one" in again.stderr


def test_without_docker_the_option_says_so(tools: str, tmp_path: Path) -> None:
    bare = tmp_path / "bin"
    bare.mkdir()
    for tool in ("bash", "dirname"):
        found = shutil.which(tool)
        assert found
        (bare / tool).symlink_to(found)
    command = [str(ROOT / "scripts/deploy/backup"), "--compose", str(tmp_path / "saved")]
    failed = subprocess.run(["bash", *command], env={"PATH": str(bare)}, capture_output=True, text=True)
    assert failed.returncode == 1
    assert failed.stderr == "backup: docker is missing: install Docker\n"
