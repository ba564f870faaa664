"""Test backup and restore with the scripts that operators run and PostgreSQL's own tools."""

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
    """Return a PATH with the tools of the embedded PostgreSQL, which have its version."""
    return f"{stack.postgres.bin_dir}:{os.environ['PATH']}"


def run(script: str, folder: Path, url: str, tools: str, **variables: str) -> subprocess.CompletedProcess[str]:
    environment = {"PATH": tools, "DATABASE_URL": url, "BACKUP_MONGO": "off", **variables}
    command = [str(ROOT / "scripts/deploy" / script), str(folder)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)


def contents(url: str) -> dict[str, list[str]]:
    with psycopg.connect(url) as connection:
        tables = [name for (name,) in connection.execute(TABLES)]
        return {
            name: sorted(row for (row,) in connection.execute(f'SELECT t::text FROM "{name}" t')) for name in tables
        }


async def test_a_restored_backup_has_all_data_and_users_continue_to_work(
    database_url: str,
    make_database: Callable[[], str],
    make_server: MakeServer,
    make_actor: MakeActor,
    tools: str,
    tmp_path: Path,
) -> None:
    source, target = make_database(), make_database()
    migrations.apply(source)
    alice = await make_actor("Alice", await make_server(database_url=source))
    project = await alice.post("/projects", {"name": "Kept", "settings": {"tabs": 4}})
    saved = run("backup", tmp_path / "saved", source, tools)
    assert saved.returncode == 0, saved.stderr
    await alice.post("/projects", {"name": "Made after the backup"})

    restored = run("restore", tmp_path / "saved", target, tools)
    assert restored.returncode == 0, restored.stderr
    base = await make_server(database_url=target)
    signed_in = await alice.at(base).log_in()
    listed = await signed_in.get("/projects")
    assert [item["name"] for item in listed["items"]] == ["Kept"]
    assert listed["items"][0]["settings"] == {"tabs": 4}
    changed = await signed_in.patch(f"/projects/{project['id']}", {"name": "Changed after the restore"})
    assert changed.status == 200


def test_every_row_of_every_table_is_restored(make_database: Callable[[], str], tools: str, tmp_path: Path) -> None:
    source, target = make_database(), make_database()
    migrations.apply(source)
    with psycopg.connect(source) as connection:
        connection.execute("INSERT INTO users (email, name, password_hash) VALUES ('a@example.org', 'Ada', 'x')")
    run("backup", tmp_path / "saved", source, tools)
    restored = run("restore", tmp_path / "saved", target, tools)
    assert restored.returncode == 0, restored.stderr
    assert contents(target) == contents(source)
    assert migrations.pending(target) == []


def test_a_backup_is_readable_by_its_owner_only(make_database: Callable[[], str], tools: str, tmp_path: Path) -> None:
    run("backup", tmp_path / "saved", make_database(), tools)
    created = [tmp_path / "saved", *(tmp_path / "saved").iterdir()]
    assert len(created) == 3
    assert [path.stat().st_mode & 0o077 for path in created] == [0, 0, 0]


def test_a_restore_into_a_database_in_use_is_refused(database_url: str, tools: str, tmp_path: Path) -> None:
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


def test_a_failed_backup_leaves_no_directory(tools: str, tmp_path: Path) -> None:
    failed = run("backup", tmp_path / "saved", "postgresql://nobody@127.0.0.1:1/nothing", tools)
    assert failed.returncode != 0
    assert not (tmp_path / "saved").exists()


STUB = """#!/bin/sh
# Stands in for MongoDB's tools: logs its input and its arguments, and reads the address from its configuration.
for word; do case $word in
  --config=*) cat "${word#--config=}" >>"$TOOL_LOG" ;;
  --archive) if [ "${0##*/}" = mongodump ]; then echo archive; else cat >>"$TOOL_LOG"; fi ;;
  *) echo "$word" >>"$TOOL_LOG" ;;
esac; done
"""


@pytest.fixture
def tool_log(tmp_path: Path) -> Path:
    """Install stand-ins of mongodump and mongorestore; return the file that logs their arguments and input."""
    for name in ("mongodump", "mongorestore"):
        (tmp_path / name).write_text(STUB)
        (tmp_path / name).chmod(0o755)
    return tmp_path / "tool.log"


def test_mongodb_is_restored_under_another_name_and_only_into_an_empty_database(
    stack: Stack, make_database: Callable[[], str], tools: str, tool_log: Path, tmp_path: Path
) -> None:
    tools = f"{tmp_path}:{tools}"
    other_uri = stack.mongo.url.replace("/workspace?", "/restored?")
    environment = {"BACKUP_MONGO": "on", "TOOL_LOG": str(tool_log), "PYTHON": sys.executable}
    saved = run("backup", tmp_path / "saved", make_database(), tools, MONGODB_URI=stack.mongo.url, **environment)
    assert saved.returncode == 0, saved.stderr
    assert f'uri: "{stack.mongo.url}"' in tool_log.read_text()

    tool_log.unlink()
    restored = run("restore", tmp_path / "saved", make_database(), tools, MONGODB_URI=other_uri, **environment)
    assert restored.returncode == 0, restored.stderr
    words = tool_log.read_text().splitlines()
    assert {"--nsInclude=workspace.*", "--nsFrom=workspace.*", "--nsTo=restored.*"} <= set(words)
    [address] = [word for word in words if word.startswith("uri:")]
    assert "restored" not in address
    assert "directConnection=true" in address

    tool_log.unlink()
    with pymongo.MongoClient(other_uri) as client:
        client.restored.jobs.insert_one({"_id": "living"})
    target = make_database()
    refused = run("restore", tmp_path / "saved", target, tools, MONGODB_URI=other_uri, **environment)
    assert refused.returncode == 1
    assert "restore into an empty one" in refused.stderr
    assert not tool_log.exists()
    assert contents(target) == {}, "PostgreSQL must not be restored either"


@pytest.mark.parametrize(
    ("uri", "server"),
    [
        ("mongodb://app:p%40ss@mongo:27017/app?authSource=admin&journal=true", "mongodb://app:p%40ss@mongo:27017/?authSource=admin&journal=true"),
        ("mongodb://app:secret@a:1,b:2/app", "mongodb://app:secret@a:1,b:2/?authSource=app"),
        ("mongodb+srv://mongo/app", "mongodb+srv://mongo/"),
    ],
)  # fmt: skip
def test_the_server_part_of_an_address_keeps_its_authentication(uri: str, server: str) -> None:
    tool = ROOT / "scripts/deploy/mongo_address.py"
    answers = [
        subprocess.run([sys.executable, str(tool), part], env={"MONGODB_URI": uri}, capture_output=True, text=True)
        for part in ("server", "database")
    ]
    assert [answer.stdout.strip() for answer in answers] == [server, "app"]


def test_a_backup_without_mongodump_fails_before_it_starts(database_url: str, tools: str, tmp_path: Path) -> None:
    if any((Path(folder) / "mongodump").exists() for folder in tools.split(":")):
        pytest.skip("mongodump is installed")
    failed = run("backup", tmp_path / "saved", database_url, tools, BACKUP_MONGO="on", MONGODB_URI="mongodb://x/y")
    assert failed.returncode == 1
    assert "mongodump is missing" in failed.stderr
    assert not (tmp_path / "saved").exists()


DOCKER = """#!/bin/sh
# Stands in for docker compose: runs the commands of a container on this machine, in the container's environment.
echo "$*" >>"$TOOL_LOG"
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
    """Return the blocks of shell commands of a page, those with or those without docker compose."""
    blocks = re.findall(r"```sh\n(.*?)```", (ROOT / "docs/operations" / page).read_text(), re.DOTALL)
    return [block for block in blocks if ("compose" in block) == with_compose]


def test_the_documented_commands_for_compose_back_up_and_restore_its_stores(
    stack: Stack, make_database: Callable[[], str], tools: str, tool_log: Path, tmp_path: Path
) -> None:
    (tmp_path / "docker").write_text(DOCKER)
    (tmp_path / "valkey-cli").write_text(STUB)
    for name in ("docker", "valkey-cli"):
        (tmp_path / name).chmod(0o755)
    checkout, saved = tmp_path / "an operator's checkout", tmp_path / "backups"
    saved.mkdir()
    shutil.copytree(ROOT / "scripts/deploy", checkout / "scripts/deploy")
    shutil.copy(ROOT / "docker-compose.yml", checkout)
    source, target = make_database(), make_database()
    migrations.apply(source)
    with psycopg.connect(source) as connection:
        connection.execute(
            "INSERT INTO users (email, email_key, name, password_hash) VALUES ('a@b', 'a@b', 'Ada', 'x')"
        )

    def follow(commands: str, url: str, mongo: str) -> subprocess.CompletedProcess[str]:
        parts = urlsplit(url)
        container = {"POSTGRES_USER": parts.username, "POSTGRES_PASSWORD": parts.password, "PASSWORD": "secret"}
        container |= {"PGHOST": parts.hostname, "PGPORT": str(parts.port), "POSTGRES_DB": parts.path[1:]}
        machine = {
            "PATH": f"{tmp_path}:{tools}",
            "TOOL_LOG": str(tool_log),
            "PYTHON": sys.executable,
            "IN_MIGRATE": mongo,
        }
        commands = commands.replace("/backups", str(saved)).replace("$(date +%F)", "2026-11-24")
        return subprocess.run(
            ["bash", "-eu", "-c", commands], cwd=checkout, env=container | machine, capture_output=True, text=True
        )

    backing_up, restoring = commands_of("backup.md", with_compose=True)
    backed_up = follow(backing_up, source, stack.mongo.url)
    assert backed_up.returncode == 0, backed_up.stderr
    assert {path.name for path in (saved / "2026-11-24").iterdir()} == {
        "MANIFEST",
        "mongo.archive",
        "mongo.database",
        "postgres.dump",
    }
    restored = follow(restoring, target, stack.mongo.url.replace("/workspace?", "/elsewhere?"))
    assert restored.returncode == 0, restored.stderr
    assert contents(target) == contents(source)
    lines = tool_log.read_text().splitlines()
    assert {"archive", "--nsTo=elsewhere.*", "FLUSHALL"} <= set(lines)
    assert lines[-1] == "compose up --detach"
    compose_calls = [line for line in lines if line.startswith("compose ")]
    assert urlsplit(source).password not in "".join(compose_calls)
    assert "mongodb://" not in "".join(compose_calls)

    repeated = follow(restoring, target, stack.mongo.url)
    assert "restore into an empty one" in repeated.stderr


def test_the_option_compose_without_docker_is_reported(tools: str, tmp_path: Path) -> None:
    bare = tmp_path / "bin"
    bare.mkdir()
    for tool in ("bash", "dirname"):
        path = shutil.which(tool)
        assert path
        (bare / tool).symlink_to(path)
    command = [str(ROOT / "scripts/deploy/backup"), "--compose", str(tmp_path / "saved")]
    failed = subprocess.run(["bash", *command], env={"PATH": str(bare)}, capture_output=True, text=True)
    assert failed.returncode == 1
    assert failed.stderr == "backup: docker is missing: install Docker\n"
