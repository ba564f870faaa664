"""``run.py dev``: it runs everything with one command, restarts crashed processes, and leaves nothing behind."""

import asyncio
import os
import signal
import socket
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import aiohttp
import pytest

from server.child import Child, StackError
from server.devstack import dev
from server.devstack.dev import WatchedProcess
from server.devstack.stack import Stack, free_port, read_env
from server.settings import StackSettings
from tests.devstack.pids import all_exited, children_of
from tests.processes import Process
from tests.timeouts import WAIT_TIMEOUT_SECONDS

READY = "Ctrl-C stops everything"


class Dev(Process):
    """A ``run.py dev``, started as a user starts it."""

    def __init__(self, directory: Path, **settings: str) -> None:
        self.port = int(settings.setdefault("PORT", str(free_port())))
        self.data_dir = Path(settings.setdefault("DATA_DIR", str(directory / "data")))
        super().__init__("dev", environment={"HOST": "127.0.0.1"}, log=directory / f"dev-{self.port}.log", **settings)

    def children(self) -> dict[str, int]:
        return children_of(self.pid)

    async def is_ready(self) -> bool:
        url = f"http://127.0.0.1:{self.port}/health/ready"
        try:
            async with aiohttp.ClientSession() as http, http.get(url) as response:
                return response.status == 200
        except aiohttp.ClientError:
            return False


@pytest.fixture
def directory() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="dev-", ignore_cleanup_errors=True) as path:
        yield Path(path)


@pytest.fixture
def running(directory: Path) -> Iterator[Dev]:
    process = Dev(directory, override="server.devstack.dev.STOP_TIMEOUT_SECONDS=600")
    try:
        process.wait_for_output(READY)
        yield process
    finally:
        process.kill()


async def until_ready(running: Dev, *, seconds: float = WAIT_TIMEOUT_SECONDS) -> None:
    deadline = time.monotonic() + seconds
    while not await running.is_ready():
        assert time.monotonic() < deadline, running.output
        await asyncio.sleep(0.05)


async def test_dev_prints_its_addresses_restarts_killed_processes_and_leaves_nothing_behind(running: Dev) -> None:
    stack = read_env(running.data_dir / "stack.env")
    base = f"127.0.0.1:{running.port}"
    stores = (stack["DATABASE_URL"], stack["REDIS_URL"], stack["MONGODB_URI"])
    for address in (f"http://{base}/api/v1", f"http://{base}/api-docs", f"ws://{base}/ws", *stores):
        assert address in running.output
    assert stack["JWT_SECRET"] not in running.output
    assert await running.is_ready()

    first = running.children()
    assert first.keys() == {"postgres", "valkey-server", "secantusd-py", "server", "worker"}
    for name in ("server", "valkey-server"):
        os.kill(first[name], signal.SIGKILL)
    running.wait_for_output("server: ended with -9; restarting it in 1 s")
    running.wait_for_output("Valkey: ended with -9; restarting it in 1 s")
    await asyncio.sleep(1.5)
    await until_ready(running)

    second = running.children()
    assert second.keys() == first.keys()
    assert {name for name in first if first[name] != second[name]} == {"server", "valkey-server"}
    assert read_env(running.data_dir / "stack.env") == stack

    assert running.terminate(number=signal.SIGINT) == 0
    assert "the data stays in" in running.output.splitlines()[-1]
    assert all_exited(second.values())


def test_closed_terminal_stops_dev_and_a_second_signal_kills_it(running: Dev) -> None:
    children = running.children()
    os.kill(children["worker"], signal.SIGSTOP)  # it cannot stop by itself
    os.kill(running.pid, signal.SIGHUP)
    running.wait_for_output("stopping the server")
    time.sleep(0.3)
    assert running.terminate(number=signal.SIGINT) == 0
    assert all_exited(children.values())


def test_no_process_outlives_dev(running: Dev) -> None:
    children = running.children()
    running.kill()
    assert all_exited(children.values(), seconds=WAIT_TIMEOUT_SECONDS)


def test_a_taken_port_ends_dev_before_anything_is_started(directory: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        process = Dev(directory, PORT=str(port))
        assert process.wait() == 1
    assert process.output == f"error: Port {port} on 127.0.0.1 is taken; set PORT to another\n"
    assert not process.data_dir.exists()


def test_second_dev_on_a_directory_in_use_ends(stack: Stack, directory: Path) -> None:
    process = Dev(directory, DATA_DIR=str(stack.data_dir))
    assert process.wait() == 1
    assert process.output.splitlines()[-1] == f"error: DATA_DIR {stack.data_dir} is in use by another `run.py dev`"


class Dying(Child):
    """A child that ends at once."""

    def __init__(self) -> None:
        super().__init__("program", [])
        self.starts = 0

    def begin(self) -> None:
        self.starts += 1
        if self.starts == 2:
            raise StackError("it cannot be started")


def test_restart_backoff_doubles_up_to_a_bound_and_resets_after_a_long_run() -> None:
    child = Dying()
    watched = WatchedProcess("program", child, child.begin, started_at=0)
    now, pauses = 0.0, []
    for starts in range(1, 8):
        watched.poll(now)
        assert watched.restart_at is not None
        pauses.append(watched.restart_at - now)
        now = watched.restart_at
        watched.poll(now - 0.1)
        assert child.starts == starts - 1
        watched.poll(now)
    assert pauses == [1, 2, 4, 8, 16, 30, 30]
    now += 61
    watched.poll(now)
    assert watched.restart_at == now + 1


@pytest.mark.parametrize(
    ("host", "base"),
    [
        ("127.0.0.1", "http://127.0.0.1:3000"),
        ("0.0.0.0", "http://127.0.0.1:3000"),
        ("::", "http://[::1]:3000"),
        ("dev.example", "http://dev.example:3000"),
    ],
)
def test_the_address_that_dev_prints_can_be_called(host: str, base: str) -> None:
    assert dev.base_url(StackSettings(data_dir=Path(), host=host, port=3000)) == base
