"""``run.py dev``: the stores, the migrations, one server and one worker, kept alive until a signal."""

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
from server.child import Child, StackError, spawn
from server.devstack.stack import Stack, check_address, free_port
from server.devstack.stores import Store
from server.settings import StackSettings, authority
from server.signals import stop_signal

READY_SECONDS = 30.0
WATCH_SECONDS = 0.5
STOP_SECONDS = 30.0  # more than a worker's grace and a server's drain
FIRST_PAUSE, LONGEST_PAUSE = 1.0, 30.0
MAX_PORT = 65535
LONG_LIFE = 60.0  # what lived this long has earned a quick restart
ROOT = Path(__file__).parent.parent.parent
RUN = ROOT / "run.py"


async def run(wanted: StackSettings) -> None:
    """Until SIGINT, SIGTERM, or the terminal is closed (SIGHUP); a second one kills.

    Raises:
        StackError: something cannot be started at all.
    """
    wanted = dataclasses.replace(wanted, port=wanted.port or free_port())
    check_address(wanted.host, wanted.port)
    stop = stop_signal()
    asyncio.get_running_loop().add_signal_handler(signal.SIGHUP, stop.set)
    say("starting the stores")
    with Stack(wanted.data_dir, say=say) as stack:
        try:
            await serve(wanted, stack, stop)
        finally:
            say("stopping the stores")
            await end([store.child for store in stack.stores], stop)
    say(f"stopped; the data stays in {wanted.data_dir}")


async def serve(wanted: StackSettings, stack: Stack, stop: asyncio.Event) -> None:
    """The programs on top of running stores, until ``stop``."""
    env_file = stack.write_env(host=wanted.host, port=wanted.port)
    environment = settings.child_environment(**stack.environment, HOST=wanted.host, PORT=str(wanted.port))
    await migrate(environment, stop)
    if stop.is_set():
        return
    programs = [program(name, environment) for name in ("server", "worker")]
    async with started(programs, stop):
        await until_ready(base_url(wanted), programs, stop)
        if not stop.is_set():
            say(summary(wanted, stack, env_file))
            await keep_alive([*map(Watched.store, stack.stores), *map(Watched.program, programs)], stop)
        say("stopping the server and the worker")


def program(name: str, environment: dict[str, str]) -> Child:
    """One of ours, which writes to our terminal."""
    return Child(name, [sys.executable, str(RUN), name], environment=environment)


async def migrate(environment: dict[str, str], stop: asyncio.Event) -> None:
    """Raises StackError where it fails, unless because we are told to stop."""
    # In a session of its own, since Ctrl-C is for us: a migration is not cut in two.
    migration = await spawn(
        sys.executable,
        str(RUN),
        "migrate",
        environment=environment,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
    )
    output = await last_words(migration, stop)
    if migration.returncode and not stop.is_set():
        lines = output.decode(errors="replace").strip().splitlines() or [f"they ended with {migration.returncode}"]
        raise StackError(f"the migrations failed: {lines[-1]}")


async def last_words(process: asyncio.subprocess.Process, stop: asyncio.Event) -> bytes:
    """All that it says until its end; one signal lets it finish, one more kills it."""
    said = asyncio.ensure_future(process.communicate())
    signals = 0
    while not said.done() and signals < 2:
        signalled = asyncio.ensure_future(stop.wait())
        await asyncio.wait({said, signalled}, return_when=asyncio.FIRST_COMPLETED)
        signalled.cancel()
        signals += stop.is_set()
        stop.clear()
    if signals:
        stop.set()
    if not said.done():
        process.kill()
    output, _ = await said
    return output


@contextlib.asynccontextmanager
async def started(programs: Sequence[Child], stop: asyncio.Event) -> AsyncIterator[None]:
    try:
        for each in programs:
            each.start()
        yield
    finally:
        await end(programs, stop)


async def end(children: Sequence[Child], stop: asyncio.Event) -> None:
    """Ask them all to stop and wait for them; one more signal, and they are killed."""
    stop.clear()
    for each in children:
        each.ask_to_stop()
    gone = asyncio.ensure_future(asyncio.to_thread(_wait_all, children))
    impatient = asyncio.ensure_future(stop.wait())
    await asyncio.wait({gone, impatient}, return_when=asyncio.FIRST_COMPLETED)
    impatient.cancel()
    if not gone.done():
        for each in children:
            each.kill()
    await gone


def _wait_all(children: Sequence[Child]) -> None:
    deadline = time.monotonic() + STOP_SECONDS
    for each in children:
        each.wait(seconds=max(0, deadline - time.monotonic()))


async def until_ready(base: str, programs: Sequence[Child], stop: asyncio.Event) -> None:
    """Raises StackError where a program ends before the server is ready, or it takes too long."""
    deadline = time.monotonic() + READY_SECONDS
    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=2)) as http:
        while not stop.is_set():
            for each in programs:
                if not each.alive:
                    raise StackError(f"the {each.name} ended with {each.exit_code} at its start; see above")
            with contextlib.suppress(aiohttp.ClientError, TimeoutError):
                async with http.get(f"{base}/health/ready") as answer:
                    if answer.status == 200:
                        return
            if time.monotonic() > deadline:
                raise StackError(f"the server was not ready within {READY_SECONDS:.0f} s")
            await asyncio.sleep(0.05)


@dataclass
class Watched:
    """Something to be started again when it dies, each time a little later."""

    name: str
    child: Child
    start: Callable[[], None]
    started_at: float = field(default_factory=time.monotonic)
    pause: float = FIRST_PAUSE
    due: float | None = None

    @classmethod
    def store(cls, store: Store) -> "Watched":
        return cls(store.name, store.child, store.begin)

    @classmethod
    def program(cls, child: Child) -> "Watched":
        return cls(child.name, child, child.start)

    def look(self, now: float) -> None:
        """Notice a death, or start again what is due. In the main thread, as ``Child`` asks."""
        if self.child.alive:
            return
        if self.due is None:
            self._wait(now, f"ended with {self.child.exit_code}")
        elif now >= self.due:
            self.started_at, self.due = now, None
            try:
                self.start()
            except StackError as error:
                self._wait(now, str(error))

    def _wait(self, now: float, why: str) -> None:
        if now - self.started_at > LONG_LIFE:
            self.pause = FIRST_PAUSE
        self.due = now + self.pause
        say(f"{self.name}: {why}; starting it again in {self.pause:.0f} s")
        self.pause = min(self.pause * 2, LONGEST_PAUSE)


async def keep_alive(watched: Sequence[Watched], stop: asyncio.Event) -> None:
    while not stop.is_set():
        for each in watched:
            each.look(time.monotonic())
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(WATCH_SECONDS):
                await stop.wait()


def summary(wanted: StackSettings, stack: Stack, env_file: Path) -> str:
    base = base_url(wanted)
    beside = wanted.port + 1 if wanted.port < MAX_PORT else wanted.port - 1
    rows = {
        "API": f"{base}/api/v1",
        "Swagger": f"{base}/api-docs",
        "Realtime": f"ws{base.removeprefix('http')}/ws",
        "PostgreSQL": stack.postgres.url,
        "Redis": f"{stack.valkey.url} ({stack.valkey.name})",
        "MongoDB": f"{stack.mongo.url} ({stack.mongo.name})",
        "stack.env": f"{env_file}: a second server or worker joins with",
        "": f"set -a; . {shlex.quote(str(env_file))}; PORT={beside} {shlex.join([sys.executable, str(RUN)])} server",
    }
    lines = [f"  {name:<11} {value}" for name, value in rows.items()]
    return "\n".join(
        [
            "ready",
            *lines,
            "  scripts/demo in a second terminal plays a short session.",
            f"  Ctrl-C stops everything; the data stays in {wanted.data_dir}.",
        ]
    )


def base_url(wanted: StackSettings) -> str:
    """Where we reach the server: to listen everywhere (0.0.0.0, ::) is no address to call."""
    host = wanted.host
    with contextlib.suppress(ValueError):  # a name
        address = ipaddress.ip_address(host)
        if address.is_unspecified:
            address = ipaddress.ip_address("127.0.0.1" if address.version == 4 else "::1")
        host = str(address)
    return f"http://{authority(host, wanted.port)}"


def say(text: str) -> None:
    with contextlib.suppress(OSError):  # the terminal may be gone
        print(f"dev: {text}", flush=True)
