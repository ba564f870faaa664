"""Several processes of one command, under one: who dies is replaced, signals reach them all.

SIGTERM and SIGINT drain all of them. SIGHUP replaces one after the other: a new process is ready before the old
one drains. Servers share a port: each has a socket of its own (SO_REUSEPORT), which is opened here and stays open
while processes come and go, because closing it would reset the connections that wait in it.
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
LONG_LIFE = 60.0  # who lived this long is replaced quickly
READY_SECONDS = 30.0
BACKLOG = 1024


async def supervise(
    arguments: Sequence[str], *, processes: int, patience: float, address: tuple[str, int] | None = None
) -> int:
    """Run ``run.py ARGUMENTS`` so many times until SIGTERM or SIGINT; 0 where all of them ended well.

    ``patience`` is how long the processes may take to stop, in seconds; who needs more is killed. At ``address``
    they listen together.

    Raises:
        StackError: a process cannot be started at all.
        SettingsError: the address cannot be listened on.
    """
    stop, reload = stop_signal(), reload_signal()
    with listeners(address, processes) as sockets, tally.folder() as measured:
        members = [
            Member(f"{arguments[0]} {number}", arguments, listener=each, measured=measured, patience=patience)
            for number, each in enumerate(sockets, 1)
        ]
        rolling: asyncio.Task[None] | None = None
        try:
            for each in members:
                each.start()
            log.info("processes started", command=arguments[0], processes=processes)
            while not stop.is_set():
                for each in members:
                    each.look(time.monotonic())
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
            codes = await end([child for each in members for child in each.children], patience=patience)
    log.info("processes stopped", command=arguments[0])
    return max(codes, default=0)


async def roll(members: Sequence["Member"]) -> None:
    """Replace them one after the other; where a new one does not become ready, all that is left stays as it is."""
    log.info("processes restarting", processes=len(members))
    for each in members:
        if not await each.replace():
            log.error("restart given up: the new process is not ready", process=each.name)
            return
    log.info("processes restarted", processes=len(members))


class Member:
    """One process and its successors, each started a little later when they die young."""

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
        return [each for each in (self._current, self._successor, self._draining) if each]

    def start(self) -> None:
        self._started, self._due = time.monotonic(), None
        self._current = self._launch()

    def look(self, now: float) -> None:
        if self._current is None or self._current.alive or self._successor:
            return  # with a successor at hand it is replaced already
        if self._due is None:
            self._wait(self._current, now)
        elif now >= self._due:
            with contextlib.suppress(StackError):  # no process to be had: it is dead, and seen to be at the next look
                self.start()

    async def replace(self) -> bool:
        """Whether a new process has taken over, and the old one has ended."""
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
            self._draining.ask_to_stop(signal.SIGHUP)  # no more connections: they are the other's
            await _ended(self._draining, seconds=self._patience)
            tally.bury(self._measured, self._draining.number)
            self._draining = None
        return True

    def _launch(self, *more: str, inherit: tuple[int, ...] = ()) -> Child:
        child = Child(
            self.name,
            [sys.executable, sys.argv[0], *self._arguments, *more],
            orphaned=signal.SIGTERM,  # an orphan drains; nothing of it is lost if it cannot
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
    told = asyncio.Event()
    loop.add_reader(pipe, told.set)
    try:
        async with asyncio.timeout(READY_SECONDS):
            await told.wait()
    except TimeoutError:
        return False
    finally:
        loop.remove_reader(pipe)
    return os.read(pipe, 1) != b""  # the end where it died


async def end(children: Sequence[Child], *, patience: float) -> list[int]:
    """Ask them all to stop and wait; their exit codes."""
    running = [each for each in children if each.alive]
    for each in running:
        each.ask_to_stop()
    deadline = time.monotonic() + patience
    for each in running:
        await _ended(each, seconds=max(0.0, deadline - time.monotonic()))
    # Who was told to stop before it could listen to signals has stopped as well.
    return [abs(each.exit_code or 0) for each in running if each.exit_code != -signal.SIGTERM]


async def _ended(child: Child, *, seconds: float) -> None:
    if not await asyncio.to_thread(child.wait, seconds=seconds):
        log.error("process killed: it did not stop in time", process=child.name, seconds=round(seconds, 1))


@contextlib.contextmanager
def listeners(address: tuple[str, int] | None, number: int) -> Iterator[Sequence[socket.socket | None]]:
    """So many sockets that listen at one address; without an address none.

    Raises:
        SettingsError: it is in use, or not ours.
    """
    if address is None:
        yield [None] * number
        return
    with contextlib.ExitStack() as stack:
        try:
            family, *_, place = socket.getaddrinfo(*address, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
            # First without SO_REUSEPORT, which would let us share the port with a stranger of the same user.
            with _bound(family, place, shared=False) as probe:
                place = probe.getsockname()
            made = [stack.enter_context(_bound(family, place, shared=True)) for _ in range(number)]
            for each in made:
                each.listen(BACKLOG)
        except OSError as error:
            raise SettingsError(f"Cannot listen on {authority(*address)}: {error.strerror}") from error
        yield made


def _bound(family: int, place: tuple[object, ...], *, shared: bool) -> socket.socket:
    made = socket.socket(family, socket.SOCK_STREAM)
    try:
        made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            made.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        if shared:
            made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        made.bind(place)
    except OSError:
        made.close()
        raise
    return made
