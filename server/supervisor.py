"""The supervisor of several processes of one command: it restarts those that exit and forwards signals to all.

SIGTERM and SIGINT drain all processes. SIGHUP starts a rolling restart: each new process is ready before the old one
drains. Servers share a port: each has its own socket (SO_REUSEPORT), which the supervisor opens and keeps open across
restarts, because closing it would reset the connections in its backlog.
"""

import asyncio
import contextlib
import os
import signal
import socket
import sys
import time
from collections.abc import Iterator, Sequence

import structlog

from server import tally
from server.child import Child, StackError
from server.settings import SettingsError, authority, child_environment
from server.signals import reload_signal, stop_signal

log = structlog.get_logger()

LOOK_SECONDS = 0.2
FIRST_PAUSE, LONGEST_PAUSE = 1.0, 30.0
LONG_LIFE = 60.0  # a process that ran this long restarts without delay
READY_SECONDS = 30.0
BACKLOG = 1024


async def supervise(
    arguments: Sequence[str], *, processes: int, patience: float, address: tuple[str, int] | None = None
) -> int:
    """Run several processes of ``run.py ARGUMENTS`` until SIGTERM or SIGINT; return 0 if all of them stopped properly.

    ``stop_timeout`` is how long the processes may take to stop, in seconds; then they are killed. All of them listen
    on ``address``.

    Raises:
        StackError: a process cannot be started.
        SettingsError: the address cannot be listened on.
    """
    stop, reload = stop_signal(), reload_signal()
    with listeners(address, processes) as sockets, tally.folder() as measured:
        members = [
            Member(f"{arguments[0]} {number}", arguments, listener=listener, measured=measured, patience=patience)
            for number, listener in enumerate(sockets, 1)
        ]
        rolling: asyncio.Task[None] | None = None
        try:
            for member in members:
                member.start()
            log.info("processes started", command=arguments[0], processes=processes)
            while not stop.is_set():
                for member in members:
                    member.look(time.monotonic())
                if reload.is_set() and (rolling is None or rolling.done()):
                    reload.clear()
                    rolling = asyncio.ensure_future(roll(members))
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(LOOK_SECONDS):
                        await stop.wait()
        finally:
            log.info("processes stopping", command=arguments[0])
            if rolling is not None:
                rolling.cancel()
                await asyncio.gather(rolling, return_exceptions=True)
            codes = await end([child for member in members for child in member.children], patience=patience)
    log.info("processes stopped", command=arguments[0])
    return max(codes, default=0)


async def roll(members: Sequence["Member"]) -> None:
    """Replace the processes one after the other; abort if a new one does not become ready."""
    log.info("processes restarting", processes=len(members))
    for member in members:
        if not await member.replace():
            log.error("restart given up: the new process is not ready", process=member.name)
            return
    log.info("processes restarted", processes=len(members))


class Member:
    """One process and its successors; restarts after early exits back off exponentially."""

    def __init__(
        self,
        name: str,
        arguments: Sequence[str],
        *,
        listener: socket.socket | None,
        measured: str,
        patience: float,
    ) -> None:
        self.name = name
        self._arguments = [*arguments, "--supervised", *(("--listener", str(listener.fileno())) if listener else ())]
        self._listener = listener
        self._measured = measured
        self._patience = patience
        self._current: Child | None = None
        self._successor: Child | None = None  # not ready yet
        self._draining: Child | None = None
        self._started = 0.0
        self._pause = 0.0
        self._due: float | None = None

    @property
    def children(self) -> list[Child]:
        return [child for child in (self._current, self._successor, self._draining) if child]

    def start(self) -> None:
        self._started, self._due = time.monotonic(), None
        self._current = self._launch()

    def look(self, now: float) -> None:
        if self._current is None or self._current.alive or self._successor:
            return  # a rolling restart is replacing it already
        if self._due is None:
            self._wait(self._current, now)
        elif now >= self._due:
            with contextlib.suppress(StackError):  # it did not start: the next poll schedules another restart
                self.start()

    async def replace(self) -> bool:
        """Start a successor and stop the old process; return False if the successor does not become ready."""
        reading, writing = os.pipe()
        try:
            new = self._launch("--ready", str(writing), inherit=(writing,))
        except StackError:
            os.close(reading)
            return False
        finally:
            os.close(writing)
        self._successor = new
        try:
            if not await _says_ready(reading):
                new.kill()
                self._successor = None
                tally.bury(self._measured, new.number)
                return False
        finally:
            os.close(reading)
        self._draining, self._current, self._successor = self._current, new, None
        self._started, self._due, self._pause = time.monotonic(), None, 0.0
        if self._draining is not None:
            self._draining.ask_to_stop(signal.SIGHUP)  # stop accepting connections: the successor has them
            await _ended(self._draining, seconds=self._patience)
            tally.bury(self._measured, self._draining.number)
            self._draining = None
        return True

    def _launch(self, *options: str, inherit: tuple[int, ...] = ()) -> Child:
        child = Child(
            self.name,
            [sys.executable, sys.argv[0], *self._arguments, *options],
            orphaned=signal.SIGTERM,  # an orphan drains; nothing is lost if it cannot
            inherit=(*inherit, *((self._listener.fileno(),) if self._listener else ())),
            environment=child_environment(PROMETHEUS_MULTIPROC_DIR=self._measured),
        )
        child.start()
        return child

    def _wait(self, dead: Child, now: float) -> None:
        if now - self._started > LONG_LIFE:
            self._pause = 0.0
        self._due = now + self._pause
        tally.bury(self._measured, dead.number)
        log.warning("process died", process=self.name, code=dead.exit_code, again_in=self._pause)
        self._pause = min(max(self._pause * 2, FIRST_PAUSE), LONGEST_PAUSE)


async def _says_ready(pipe: int) -> bool:
    loop = asyncio.get_running_loop()
    readable = asyncio.Event()
    loop.add_reader(pipe, readable.set)
    try:
        async with asyncio.timeout(READY_SECONDS):
            await readable.wait()
    except TimeoutError:
        return False
    finally:
        loop.remove_reader(pipe)
    return os.read(pipe, 1) != b""  # empty at the end of the pipe: the process exited


async def end(children: Sequence[Child], *, patience: float) -> list[int]:
    """Send the stop signal to all, wait, kill those that reach the timeout; return the exit codes."""
    running = [child for child in children if child.alive]
    for child in running:
        child.ask_to_stop()
    deadline = time.monotonic() + patience
    for child in running:
        await _ended(child, seconds=max(0.0, deadline - time.monotonic()))
    # A process that got SIGTERM before it installed its signal handlers has stopped properly, too.
    return [abs(child.exit_code or 0) for child in running if child.exit_code != -signal.SIGTERM]


async def _ended(child: Child, *, seconds: float) -> None:
    if not await asyncio.to_thread(child.wait, seconds=seconds):
        log.error("process killed: it did not stop in time", process=child.name, seconds=round(seconds, 1))


@contextlib.contextmanager
def listeners(address: tuple[str, int] | None, number: int) -> Iterator[Sequence[socket.socket | None]]:
    """Open ``number`` sockets that listen on one address; without an address yield None for each.

    Raises:
        SettingsError: the address is in use, or not an address of this machine.
    """
    if address is None:
        yield [None] * number
        return
    with contextlib.ExitStack() as stack:
        try:
            family, *_, resolved = socket.getaddrinfo(*address, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
            # First without SO_REUSEPORT, which would share the port with unrelated processes of the same user.
            with _bound(family, resolved, shared=False) as probe:
                resolved = probe.getsockname()
            sockets = [stack.enter_context(_bound(family, resolved, shared=True)) for _ in range(number)]
            for listener in sockets:
                listener.listen(BACKLOG)
        except OSError as error:
            raise SettingsError(f"Cannot listen on {authority(*address)}: {error.strerror}") from error
        yield sockets


def _bound(family: int, address: tuple[object, ...], *, shared: bool) -> socket.socket:
    listener = socket.socket(family, socket.SOCK_STREAM)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        if shared:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        listener.bind(address)
    except OSError:
        listener.close()
        raise
    return listener
