"""``run.py dev``: the stores, the migrations, one server and one worker, restarted on exit until a signal."""

import asyncio
import contextlib
import dataclasses
import ipaddress
import shlex
import signal
import sys
import time
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import aiohttp

from server import settings
from server.child import Child, StackError, spawn_process
from server.devstack.stack import Stack, check_address, free_port
from server.devstack.stores import Store
from server.settings import StackSettings, authority
from server.signals import watch_stop_signals

READY_TIMEOUT_SECONDS = 30.0
POLL_INTERVAL_SECONDS = 0.5
STOP_TIMEOUT_SECONDS = 30.0  # longer than a worker's grace period and a server's drain
MIN_BACKOFF_SECONDS, MAX_BACKOFF_SECONDS = 1.0, 30.0
MAX_PORT = 65535
BACKOFF_RESET_SECONDS = 60.0  # a process that ran this long restarts without delay
ROOT = Path(__file__).parent.parent.parent
RUN_SCRIPT = ROOT / "run.py"


async def run(config: StackSettings) -> None:
    """Run until SIGINT, SIGTERM or SIGHUP (the terminal is closed); a second signal kills all processes.

    Raises:
        StackError: a store or program cannot be started.
    """
    config = dataclasses.replace(config, port=config.port or free_port())
    check_address(config.host, config.port)
    stop = watch_stop_signals()
    asyncio.get_running_loop().add_signal_handler(signal.SIGHUP, stop.set)
    print_status("starting the stores")
    with Stack(config.data_dir, print_status=print_status) as stack:
        try:
            await serve(config, stack, stop)
        finally:
            print_status("stopping the stores")
            await stop_all([store.child for store in stack.stores], stop)
    print_status(f"stopped; the data stays in {config.data_dir}")


async def serve(config: StackSettings, stack: Stack, stop: asyncio.Event) -> None:
    """Run the programs on top of running stores, until ``stop``."""
    env_file = stack.write_env(host=config.host, port=config.port)
    environment = settings.child_environment(**stack.environment, HOST=config.host, PORT=str(config.port))
    await migrate(environment, stop)
    if stop.is_set():
        return
    programs = [program(name, environment) for name in ("server", "worker")]
    async with running(programs, stop):
        await wait_ready(base_url(config), programs, stop)
        if not stop.is_set():
            print_status(summary(config, stack, env_file))
            await restart_on_exit(
                [*map(WatchedProcess.store, stack.stores), *map(WatchedProcess.program, programs)], stop
            )
        print_status("stopping the server and the worker")


def program(name: str, environment: dict[str, str]) -> Child:
    """Return a child process of ``run.py`` that writes to this terminal."""
    return Child(name, [sys.executable, str(RUN_SCRIPT), name], environment=environment)


async def migrate(environment: dict[str, str], stop: asyncio.Event) -> None:
    """Run the migrations in a child process.

    Raises:
        StackError: a migration fails, except after a signal to stop.
    """
    # In its own session, so that Ctrl-C does not interrupt a migration.
    migration = await spawn_process(
        sys.executable,
        str(RUN_SCRIPT),
        "migrate",
        environment=environment,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
    )
    output = await wait_output(migration, stop)
    if migration.returncode and not stop.is_set():
        lines = output.decode(errors="replace").strip().splitlines() or [f"exit code {migration.returncode}"]
        raise StackError(f"migrations failed: {lines[-1]}")


async def wait_output(process: asyncio.subprocess.Process, stop: asyncio.Event) -> bytes:
    """Return the output of a process until its end; one signal lets it finish, a second one kills it."""
    finished = asyncio.ensure_future(process.communicate())
    signals = 0
    while not finished.done() and signals < 2:
        signalled = asyncio.ensure_future(stop.wait())
        await asyncio.wait({finished, signalled}, return_when=asyncio.FIRST_COMPLETED)
        signalled.cancel()
        signals += stop.is_set()
        stop.clear()
    if signals:
        stop.set()
    if not finished.done():
        process.kill()
    output, _ = await finished
    return output


@contextlib.asynccontextmanager
async def running(programs: Sequence[Child], stop: asyncio.Event) -> AsyncIterator[None]:
    try:
        for program in programs:
            program.start()
        yield
    finally:
        await stop_all(programs, stop)


async def stop_all(children: Sequence[Child], stop: asyncio.Event) -> None:
    """Send the stop signal to all children and wait; another signal to this process kills them."""
    stop.clear()
    for child in children:
        child.send_stop_signal()
    all_ended = asyncio.ensure_future(asyncio.to_thread(_wait_all, children))
    second_signal = asyncio.ensure_future(stop.wait())
    await asyncio.wait({all_ended, second_signal}, return_when=asyncio.FIRST_COMPLETED)
    second_signal.cancel()
    if not all_ended.done():
        for child in children:
            child.kill()
    await all_ended


def _wait_all(children: Sequence[Child]) -> None:
    deadline = time.monotonic() + STOP_TIMEOUT_SECONDS
    for child in children:
        child.wait(timeout=max(0, deadline - time.monotonic()))


async def wait_ready(base: str, programs: Sequence[Child], stop: asyncio.Event) -> None:
    """Wait until the server is ready.

    Raises:
        StackError: a program ends before that, or the server is not ready in time.
    """
    deadline = time.monotonic() + READY_TIMEOUT_SECONDS
    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=2)) as http:
        while not stop.is_set():
            for program in programs:
                if not program.alive:
                    raise StackError(f"the {program.name} ended with {program.exit_code} at its start; see above")
            with contextlib.suppress(aiohttp.ClientError, TimeoutError):
                async with http.get(f"{base}/health/ready") as response:
                    if response.status == 200:
                        return
            if time.monotonic() > deadline:
                raise StackError(f"the server was not ready within {READY_TIMEOUT_SECONDS:.0f} s")
            await asyncio.sleep(0.05)


@dataclass
class WatchedProcess:
    """A process that is restarted when it exits, with exponential backoff."""

    name: str
    child: Child
    start: Callable[[], None]
    started_at: float = field(default_factory=time.monotonic)
    backoff: float = MIN_BACKOFF_SECONDS
    restart_at: float | None = None

    @classmethod
    def store(cls, store: Store) -> "WatchedProcess":
        return cls(store.name, store.child, store.launch)

    @classmethod
    def program(cls, child: Child) -> "WatchedProcess":
        return cls(child.name, child, child.start)

    def poll(self, now: float) -> None:
        """Schedule a restart after an exit, or restart when it is due; in the main thread, as ``Child`` requires."""
        if self.child.alive:
            return
        if self.restart_at is None:
            self._schedule_restart(now, f"ended with {self.child.exit_code}")
        elif now >= self.restart_at:
            self.started_at, self.restart_at = now, None
            try:
                self.start()
            except StackError as error:
                self._schedule_restart(now, str(error))

    def _schedule_restart(self, now: float, reason: str) -> None:
        if now - self.started_at > BACKOFF_RESET_SECONDS:
            self.backoff = MIN_BACKOFF_SECONDS
        self.restart_at = now + self.backoff
        print_status(f"{self.name}: {reason}; restarting it in {self.backoff:.0f} s")
        self.backoff = min(self.backoff * 2, MAX_BACKOFF_SECONDS)


async def restart_on_exit(watched: Sequence[WatchedProcess], stop: asyncio.Event) -> None:
    while not stop.is_set():
        for process in watched:
            process.poll(time.monotonic())
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(POLL_INTERVAL_SECONDS):
                await stop.wait()


def summary(config: StackSettings, stack: Stack, env_file: Path) -> str:
    base = base_url(config)
    port = config.port + 1 if config.port < MAX_PORT else config.port - 1
    rows = {
        "API": f"{base}/api/v1",
        "Swagger": f"{base}/api-docs",
        "Realtime": f"ws{base.removeprefix('http')}/ws",
        "PostgreSQL": stack.postgres.url,
        "Redis": f"{stack.valkey.url} ({stack.valkey.name})",
        "MongoDB": f"{stack.mongo.url} ({stack.mongo.name})",
        "stack.env": f"{env_file}: a second server or worker joins with",
        "": f"set -a; . {shlex.quote(str(env_file))}; PORT={port} "
        f"{shlex.join([sys.executable, str(RUN_SCRIPT)])} server",
    }
    lines = [f"  {name:<11} {value}" for name, value in rows.items()]
    return "\n".join(
        [
            "ready",
            *lines,
            "  scripts/demo in a second terminal plays a short session.",
            f"  Ctrl-C stops everything; the data stays in {config.data_dir}.",
        ]
    )


def base_url(config: StackSettings) -> str:
    """Return the URL of the server, with a loopback address if it listens on all addresses (0.0.0.0, ::)."""
    host = config.host
    with contextlib.suppress(ValueError):  # a host name
        address = ipaddress.ip_address(host)
        if address.is_unspecified:
            address = ipaddress.ip_address("127.0.0.1" if address.version == 4 else "::1")
        host = str(address)
    return f"http://{authority(host, config.port)}"


def print_status(text: str) -> None:
    with contextlib.suppress(OSError):  # the terminal may be closed
        print(f"dev: {text}", flush=True)
