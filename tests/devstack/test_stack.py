"""The embedded stores keep acknowledged writes and their addresses, and change nothing outside their directory."""

import contextlib
import os
import signal
import socket
import stat
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psycopg
import pymongo
import pytest
import redis

from server.child import Child, StackError
from server.devstack.postgres import Postgres
from server.devstack.stack import Stack, check_address, read_env
from server.devstack.stores import StoreConfig
from tests.devstack.pids import all_exited
from tests.processes import ROOT
from tests.timeouts import WAIT_TIMEOUT_SECONDS

Insert = Callable[[int], None]


@pytest.fixture
def directory() -> Iterator[Path]:
    """A directory that other users can open, since PostgreSQL may run as one; with a space in its name."""
    with tempfile.TemporaryDirectory(prefix="a stack ", ignore_cleanup_errors=True) as path:
        yield Path(path)


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


@contextlib.contextmanager
def postgres_rows(stack: Stack) -> Iterator[Insert]:
    with psycopg.connect(stack.postgres.url, autocommit=True) as connection:
        connection.execute("CREATE TABLE IF NOT EXISTS numbers (n int)")
        yield lambda n: connection.execute("INSERT INTO numbers VALUES (%s)", (n,)) and None


@contextlib.contextmanager
def valkey_members(stack: Stack) -> Iterator[Insert]:
    with redis.Redis.from_url(stack.valkey.url) as client:
        yield lambda n: client.sadd("numbers", n) and None


@contextlib.contextmanager
def mongo_documents(stack: Stack) -> Iterator[Insert]:
    with pymongo.MongoClient(stack.mongo.url, serverSelectionTimeoutMS=2000, retryWrites=False) as client:
        yield lambda n: client.get_default_database().numbers.insert_one({"n": n}) and None


WRITERS: dict[str, Callable[[Stack], contextlib.AbstractContextManager[Insert]]] = {
    "postgres": postgres_rows,
    "valkey": valkey_members,
    "mongo": mongo_documents,
}


def numbers_in(stack: Stack, name: str) -> set[int]:
    match name:
        case "postgres":
            with psycopg.connect(stack.postgres.url) as connection:
                return {n for (n,) in connection.execute("SELECT n FROM numbers")}
        case "valkey":
            with redis.Redis.from_url(stack.valkey.url) as client:
                return {int(n) for n in client.smembers("numbers")}
        case _:
            with pymongo.MongoClient(stack.mongo.url, serverSelectionTimeoutMS=2000) as client:
                return {row["n"] for row in client.get_default_database().numbers.find()}


def write_until_it_fails(writing: contextlib.AbstractContextManager[Insert], acknowledged: list[int]) -> None:
    with contextlib.suppress(psycopg.Error, redis.RedisError, pymongo.errors.PyMongoError), writing as insert:
        for n in range(1_000_000):
            insert(n)
            acknowledged.append(n)


def test_killed_stores_restart_at_their_addresses_with_all_acknowledged_writes(own_stack: Stack) -> None:
    before = own_stack.urls, {store.pid for store in own_stack.stores}
    acknowledged: dict[str, list[int]] = {name: [] for name in WRITERS}
    writers = [
        threading.Thread(target=write_until_it_fails, args=(WRITERS[name](own_stack), written))
        for name, written in acknowledged.items()
    ]
    for writer in writers:
        writer.start()
    while any(len(written) <= 10 for written in acknowledged.values()):
        time.sleep(0.05)
    own_stack.kill()  # while the writers write
    assert [(store.alive, store.pid, store.is_ready()) for store in own_stack.stores] == [(False, None, False)] * 3
    for writer in writers:
        writer.join(timeout=WAIT_TIMEOUT_SECONDS)
    for store in own_stack.stores:
        store.start()
    assert own_stack.urls == before[0]
    assert before[1].isdisjoint(store.pid for store in own_stack.stores)
    for name, written in acknowledged.items():
        assert set(written) - numbers_in(own_stack, name) == set(), name


def test_a_store_restarts_at_its_address(stack: Stack) -> None:
    url, pid = stack.valkey.url, stack.valkey.pid
    stack.valkey.restart()
    assert stack.valkey.url == url
    assert stack.valkey.pid != pid
    assert stack.valkey.is_ready()


def test_a_stack_keeps_its_addresses_and_secrets_and_only_a_taken_port_changes(directory: Path) -> None:
    with Stack(directory / "data") as first:
        before = first.environment
        first.mongo.kill()
    with Stack(directory / "data") as second:
        assert second.environment == before
        second.mongo.kill()
    port = int(before["REDIS_URL"].rpartition(":")[2].removesuffix("/0"))
    with socket.create_server(("127.0.0.1", port)), Stack(directory / "data") as third:
        changed = {name for name, value in third.environment.items() if value != before[name]}
        assert changed == {"REDIS_URL"}
        third.mongo.kill()


def test_data_directory_is_traversable_and_its_content_private(stack: Stack) -> None:
    stack.write_env(host="127.0.0.1", port=3000)
    assert mode(stack.data_dir) == 0o711
    assert {path.name: oct(mode(path)) for path in stack.data_dir.iterdir() if mode(path) & 0o077} == {
        "mongo.toml": oct(mode(stack.data_dir / "mongo.toml"))  # empty
    }
    assert mode(stack.data_dir / "stack.env") == 0o600


def test_stack_env_is_readable_by_a_shell_and_by_read_env(stack: Stack) -> None:
    path = stack.write_env(host="127.0.0.1", port=3456)
    shell = subprocess.run(
        ["sh", "-c", 'set -a; . "$0"; env', str(path)], env={}, capture_output=True, text=True, check=True
    )
    seen = dict(line.split("=", 1) for line in shell.stdout.splitlines())
    expected = {**stack.environment, "HOST": "127.0.0.1", "PORT": "3456"}
    assert {name: seen[name] for name in expected} == expected
    assert read_env(path) == expected


def test_second_stack_in_the_same_directory_is_rejected(stack: Stack) -> None:
    with pytest.raises(StackError, match=f"^DATA_DIR {stack.data_dir} is in use by another `run.py dev`$"):
        Stack(stack.data_dir).__enter__()
    assert all(store.is_ready() for store in stack.stores)


@pytest.mark.parametrize("below", ["file", "file/data"])
def test_data_directory_that_cannot_be_written_is_named(directory: Path, below: str) -> None:
    (directory / "file").touch()
    with pytest.raises(StackError) as caught:
        Stack(directory / below).__enter__()
    assert str(caught.value).startswith(f"DATA_DIR {directory / below} cannot be written: ")
    assert "\n" not in str(caught.value)


def test_a_damaged_record_of_the_passwords_is_named(directory: Path) -> None:
    (directory / "stack.json").write_text("{")
    with pytest.raises(StackError, match=r"stack\.json is damaged"):
        Stack(directory).__enter__()


def test_existing_directory_keeps_its_mode_and_an_interrupted_initdb_is_discarded(directory: Path) -> None:
    data = directory / "data"
    half = data / "postgres.new"
    half.mkdir(parents=True)
    data.chmod(0o755)
    (half / "PG_VERSION").write_text("18\n")  # the first thing that initdb writes
    with Stack(data) as stack:
        assert stack.postgres.is_ready()
        stack.mongo.kill()
    assert mode(data) == 0o755
    assert not half.exists()


HOLD = """
import sys, time
from pathlib import Path
from server.devstack.stack import Stack

with Stack(Path(sys.argv[1])) as stack:
    print(*(store.pid for store in stack.stores), *stack.urls.values(), flush=True)
    time.sleep(60)
"""


def hold(directory: Path) -> tuple["subprocess.Popen[str]", list[int], list[str]]:
    """Start a process with its own stack; return it with the process ids and URLs of its stores."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(directory)], env={**os.environ, "PYTHONPATH": str(ROOT)}, stdout=-1, text=True
    )
    assert process.stdout
    words = process.stdout.readline().split()
    return process, [int(pid) for pid in words[:3]], words[3:]


def test_stores_end_with_their_parent_and_the_next_stack_waits_for_them(directory: Path) -> None:
    first, old, urls = hold(directory / "data")
    os.kill(old[0], signal.SIGSTOP)  # PostgreSQL is slow to stop and still has its port
    thaw = threading.Timer(1, os.kill, (old[0], signal.SIGCONT))
    first.kill()
    first.communicate()
    thaw.start()
    with Stack(directory / "data") as second:
        assert all_exited(old)
        assert list(second.urls.values()) == urls
        second.mongo.kill()


def test_a_process_of_an_earlier_run_that_does_not_end_is_named(tmp_path: Path) -> None:
    first = Child("store", ["sleep", "60"], lock=tmp_path / "lock")
    first.start()
    try:
        with pytest.raises(
            StackError, match=f"^store of an earlier run has not ended yet; end its process {first.pid}$"
        ):
            Child("store", [], lock=tmp_path / "lock").wait_for_previous(timeout=0)
    finally:
        first.kill()


def test_a_taken_port_is_named() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(StackError, match=f"^Port {port} on 127.0.0.1 is taken; set PORT to another$"):
            check_address("127.0.0.1", port)


def test_address_of_another_machine_is_named() -> None:
    with pytest.raises(StackError, match=r"^Cannot listen on 192\.0\.2\.1:3000: "):
        check_address("192.0.2.1", 3000)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root runs PostgreSQL as another user")
def test_only_closed_parent_directories_are_made_traversable_and_reported(tmp_path: Path) -> None:
    closed, open_already = tmp_path / "closed", tmp_path / "closed" / "open"
    open_already.mkdir(parents=True)
    closed.chmod(0o700)
    open_already.chmod(0o755)
    messages: list[str] = []
    Postgres(StoreConfig(open_already, 1, messages.append), password="x")._allow_traversal(open_already / "postgres")
    assert (mode(closed), mode(open_already)) == (0o701, 0o755)
    assert f"set o+x on {closed}, because PostgreSQL runs as nobody, not as root" in messages
