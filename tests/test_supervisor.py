"""A supervised server of several processes: restarts, rolling restarts and signals."""

import asyncio
import os
import signal
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import aiohttp
import pytest

from server.devstack.stack import Stack
from tests.actors import Actor
from tests.conftest import environment_of
from tests.devstack.pids import all_exited
from tests.processes import Processes, Server
from tests.timeouts import WAIT_TIMEOUT_SECONDS


async def started(processes: Processes, *, number: int = 2, **settings: str) -> Server:
    server = processes.server("--processes", str(number), **settings)
    await asyncio.to_thread(server.wait_for_output, rf"(?s)(server ready.*){{{number}}}")
    return server


def members(server: Server) -> list[int]:
    return [int(pid) for pid in Path(f"/proc/{server.pid}/task/{server.pid}/children").read_text().split()]


async def counting(server: Server, number: int) -> None:
    """Wait until the supervisor has ``number`` running processes."""
    async with asyncio.timeout(WAIT_TIMEOUT_SECONDS):
        while len(members(server)) != number:
            await asyncio.sleep(0.05)


class Hammer:
    """Clients that open a connection for each request, or that keep theirs and pause between requests.

    ``failures`` are their errors and the statuses other than 200.
    """

    def __init__(self, base: str, *, clients: int = 4, pause: float | None = None) -> None:
        self.answers = 0
        self.failures: list[str] = []
        self._base = base
        self._clients = clients
        self._pause = pause

    async def __aenter__(self) -> "Hammer":
        self._tasks = [asyncio.ensure_future(self._run()) for _ in range(self._clients)]
        return self

    async def __aexit__(self, *_: object) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _run(self) -> None:
        connector = aiohttp.TCPConnector(force_close=self._pause is None)
        async with aiohttp.ClientSession(connector=connector) as session:
            session._retry_connection = False  # else aiohttp retries silently
            while True:
                try:
                    async with session.get(f"{self._base}/health") as response:
                        await response.read()
                        if response.status != 200:
                            self.failures.append(str(response.status))
                except aiohttp.ClientError as error:
                    self.failures.append(repr(error))
                self.answers += 1
                await asyncio.sleep(self._pause or 0)


async def test_connections_go_to_all_processes_on_one_port(processes: Processes, http: aiohttp.ClientSession) -> None:
    server = await started(processes, LOG_LEVEL="info")
    async with Hammer(server.base) as hammer:
        while hammer.answers < 100:
            await asyncio.sleep(0.05)
    assert hammer.failures == []
    inodes = [_listening(pid) for pid in members(server)]
    assert len(inodes) == 2
    assert inodes[0] != inodes[1]


def _listening(pid: int) -> str:
    """Return the listening socket that the supervisor passed to a process."""
    arguments = Path(f"/proc/{pid}/cmdline").read_text().split("\0")
    return str(Path(f"/proc/{pid}/fd/{arguments[arguments.index('--listener') + 1]}").readlink())


async def test_clients_do_not_notice_a_rolling_restart(processes: Processes) -> None:
    server = await started(processes)
    before = members(server)
    async with Hammer(server.base) as hammer:
        os.kill(server.pid, signal.SIGHUP)
        await asyncio.to_thread(server.wait_for_output, "processes restarted")
    assert hammer.failures == []
    assert hammer.answers > 50
    after = members(server)
    assert len(after) == 2
    assert not set(before) & set(after)
    assert await asyncio.to_thread(server.terminate) == 0
    assert all_exited([*before, *after], seconds=WAIT_TIMEOUT_SECONDS)


async def test_clients_that_keep_their_connections_do_not_notice_a_rolling_restart(processes: Processes) -> None:
    server = await started(processes)
    async with Hammer(server.base, clients=16, pause=1.0) as hammer:
        while hammer.answers < 16:
            await asyncio.sleep(0.05)
        os.kill(server.pid, signal.SIGHUP)
        await asyncio.to_thread(server.wait_for_output, "processes restarted")
    assert hammer.failures == []


async def test_crashed_successor_is_replaced_while_its_predecessor_drains(processes: Processes) -> None:
    server = await started(processes, number=1, DRAIN_SECONDS="60")
    [old] = members(server)
    os.kill(server.pid, signal.SIGHUP)
    await counting(server, 2)
    os.kill(old, signal.SIGSTOP)  # it drains for long
    try:
        await replaced(server, 1)
        [new] = [pid for pid in members(server) if pid != old]
        os.kill(new, signal.SIGKILL)
        await replaced(server, 2)
        assert old in members(server)
        assert len(members(server)) == 2
    finally:
        os.kill(old, signal.SIGCONT)


async def replaced(server: Server, times: int) -> None:
    """Wait until ``times`` processes after the first have become ready."""
    await asyncio.to_thread(server.wait_for_output, rf"(?s)(server ready.*){{{times + 1}}}")


async def test_failed_rolling_restart_keeps_the_old_processes(processes: Processes, own_stack: Stack) -> None:
    server = await started(processes, **own_stack.environment)
    before = members(server)
    own_stack.valkey.kill()  # no new process can start without it
    os.kill(server.pid, signal.SIGHUP)
    await asyncio.to_thread(server.wait_for_output, "rolling restart aborted")
    assert members(server) == before
    async with Hammer(server.base) as hammer:
        while hammer.answers < 20:
            await asyncio.sleep(0.05)
    assert hammer.failures == []


async def test_processes_without_a_supervisor_ignore_sighup(
    processes: Processes, isolated_stores: dict[str, str]
) -> None:
    bare, worker = processes.server(), processes.worker(**environment_of(isolated_stores)).ready()
    assert bare.base
    for process in (bare, worker):
        os.kill(process.pid, signal.SIGHUP)
        await asyncio.to_thread(process.wait_for_output, "SIGHUP ignored")
    assert await asyncio.to_thread(bare.terminate) == 0
    assert await asyncio.to_thread(worker.terminate) == 0


async def test_sockets_get_a_notice_of_a_rolling_restart_and_reconnect_to_the_successor(
    processes: Processes, http: aiohttp.ClientSession
) -> None:
    server = await started(processes)
    ada = await Actor(http, server.base, "Ada").register()
    workspace = await ada.make_workspace()
    socket = await ada.connect(workspace)
    os.kill(server.pid, signal.SIGHUP)
    await socket.assert_push("server:draining")
    assert await socket.closed() == 1012
    successor = await ada.connect(workspace)
    assert successor.joined


async def test_killed_process_is_replaced_and_its_backlog_is_served(processes: Processes) -> None:
    server = await started(processes)
    first = members(server)
    host, _, port = server.base.removeprefix("http://").partition(":")
    os.kill(first[0], signal.SIGSTOP)
    with waiting_in(host, int(port), connections=16) as clients:
        os.kill(first[0], signal.SIGKILL)
        for client in clients:
            client.sendall(b"GET /health HTTP/1.1\r\nHost: ada\r\nConnection: close\r\n\r\n")
        responses = await asyncio.gather(*(asyncio.to_thread(client.recv, 12) for client in clients))
    assert set(responses) == {b"HTTP/1.1 200"}
    assert len(members(server)) == 2
    assert first[0] not in members(server)


@contextmanager
def waiting_in(host: str, port: int, *, connections: int) -> Iterator[list[socket.socket]]:
    clients = [socket.create_connection((host, port), timeout=WAIT_TIMEOUT_SECONDS) for _ in range(connections)]
    yield clients
    for client in clients:
        client.close()


async def test_process_that_keeps_crashing_restarts_with_backoff(processes: Processes) -> None:
    server = await started(processes)
    for pause in (0.0, 1.0, 2.0):
        os.kill(members(server)[-1], signal.SIGKILL)
        await asyncio.to_thread(server.wait_for_output, rf'"retry_in":{pause}')
        await counting(server, 2)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_stop_signal_ends_all_processes(number: int, processes: Processes) -> None:
    server = await started(processes, number=3)
    pids = members(server)
    assert await asyncio.to_thread(server.terminate, number=number) == 0
    assert all_exited(pids, seconds=WAIT_TIMEOUT_SECONDS)
    assert "Traceback" not in server.output


async def test_supervisor_stops_cleanly_before_its_processes_handle_signals(processes: Processes) -> None:
    server = processes.server("--processes", "2")
    await asyncio.to_thread(server.wait_for_output, "processes started")
    assert await asyncio.to_thread(server.terminate) == 0


async def test_servers_do_not_outlive_a_killed_supervisor(processes: Processes) -> None:
    server = await started(processes)
    pids = members(server)
    server.kill()
    assert all_exited(pids, seconds=WAIT_TIMEOUT_SECONDS)


async def test_a_port_that_another_server_has_is_not_shared(processes: Processes) -> None:
    server = await started(processes)
    port = server.base.rpartition(":")[2]
    second = processes.server("--processes", "2", PORT=port)
    assert await asyncio.to_thread(second.wait) == 1
    assert "Cannot listen on" in second.output
