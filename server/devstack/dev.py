"""``run.py dev``: the stores, the migrations, one server and one worker, kept alive until a signal."""

import asyncio
import contextlib
import sys
import time
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import aiohttp

from server import settings
from server.devstack.process import Child, StackError
from server.devstack.stack import Stack, is_free
from server.devstack.stores import Store
from server.settings import StackSettings
from server.signals import stop_signal

READY_SECONDS = 30.0
WATCH_SECONDS = 0.5
FIRST_PAUSE, LONGEST_PAUSE = 1.0, 30.0
LONG_LIFE = 60.0  # what lived this long has earned a quick restart
RUN = Path(__file__).parent.parent.parent / "run.py"


async def run(wanted: StackSettings) -> None:
    """Until SIGINT or SIGTERM; a second one kills.

    Raises:
        StackError: something cannot be started at all.
    """
    if not is_free(wanted.host, wanted.port):
        raise StackError(f"port {wanted.port} on {wanted.host} is taken; set PORT to another")
    stop = stop_signal()
    with Stack(wanted.data_dir, say=say) as stack:
        env_file = stack.write_env(port=wanted.port)
        environment = settings.child_environment(**stack.environment, HOST=wanted.host, PORT=str(wanted.port))
        await migrate(environment)
        programs = [program(name, environment) for name in ("server", "worker")]
        async with started(programs, stop):
            await until_ready(f"http://{wanted.host}:{wanted.port}", programs, stop)
            if not stop.is_set():
                say(summary(wanted, stack, env_file))
                await keep_alive([*map(Watched.store, stack.stores), *map(Watched.program, programs)], stop)
            say("stopping")
    say(f"stopped; the data stays in {wanted.data_dir}")


def program(name: str, environment: dict[str, str]) -> Child:
    return Child(name, [sys.executable, str(RUN), name], log=None, environment=environment)


async def migrate(environment: dict[str, str]) -> None:
    child = await asyncio.create_subprocess_exec(
        sys.executable,
        str(RUN),
        "migrate",
        env=environment,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
    )
    output, _ = await child.communicate()
    if child.returncode:
        raise StackError(f"the migrations failed: {output.decode().strip()}")


@contextlib.asynccontextmanager
async def started(programs: Sequence[Child], stop: asyncio.Event) -> AsyncIterator[None]:
    """The server and the worker; at the end both are asked to stop, and killed at the second signal."""
    try:
        for each in programs:
            each.start()
        yield
    finally:
        for each in programs:
            each.ask_to_stop()
        stop.clear()
        gone = asyncio.ensure_future(asyncio.to_thread(_wait_all, programs))
        impatient = asyncio.ensure_future(stop.wait())
        await asyncio.wait({gone, impatient}, return_when=asyncio.FIRST_COMPLETED)
        impatient.cancel()
        for each in programs:
            each.kill()
        await gone


def _wait_all(programs: Sequence[Child]) -> None:
    for each in programs:
        each.wait(seconds=30)


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
            self.pause = FIRST_PAUSE if now - self.started_at > LONG_LIFE else self.pause
            self.due = now + self.pause
            say(f"{self.name} ended with {self.child.exit_code}; starting it again in {self.pause:.0f} s")
            self.pause = min(self.pause * 2, LONGEST_PAUSE)
        elif now >= self.due:
            self.started_at, self.due = now, None
            self.start()


async def keep_alive(watched: Sequence[Watched], stop: asyncio.Event) -> None:
    while not stop.is_set():
        for each in watched:
            each.look(time.monotonic())
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(WATCH_SECONDS):
                await stop.wait()


def summary(wanted: StackSettings, stack: Stack, env_file: Path) -> str:
    base = f"http://{wanted.host}:{wanted.port}"
    rows = {
        "API": f"{base}/api/v1",
        "Swagger": f"{base}/api-docs",
        "Sockets": f"ws://{wanted.host}:{wanted.port}/ws",
        "PostgreSQL": stack.postgres.url,
        "Valkey": stack.valkey.url,
        "MongoDB": stack.mongo.url,
        "Settings": f"{env_file} (to join: set -a; . {env_file}; PORT=3001 {sys.executable} run.py server)",
    }
    lines = [f"  {name:<11} {value}" for name, value in rows.items()]
    return "\n".join(
        ["ready", *lines, "  scripts/demo in a second terminal plays a session; Ctrl-C stops, the data stays."]
    )


def say(text: str) -> None:
    print(f"dev: {text}", flush=True)
