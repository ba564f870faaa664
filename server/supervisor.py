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

from server import multiprocess_metrics
from server.child import Child, StackError
from server.settings import SettingsError, authority, child_environment
from server.signals import watch_reload_signal, watch_stop_signals

log = structlog.get_logger()

POLL_INTERVAL_SECONDS = 0.2
MIN_BACKOFF_SECONDS, MAX_BACKOFF_SECONDS = 1.0, 30.0
BACKOFF_RESET_SECONDS = 60.0  # a process that ran this long restarts without delay
READY_TIMEOUT_SECONDS = 30.0
LISTEN_BACKLOG = 1024


async def supervise(
    arguments: Sequence[str], *, processes: int, stop_timeout: float, address: tuple[str, int] | None = None
) -> int:
    """Run several processes of ``run.py ARGUMENTS`` until SIGTERM or SIGINT; return 0 if all of them stopped properly.

    ``stop_timeout`` is how long the processes may take to stop, in seconds; then they are killed. All of them listen
    on ``address``.

    Raises:
        StackError: a process cannot be started.
        SettingsError: the address cannot be listened on.
    """
    stop, reload = watch_stop_signals(), watch_reload_signal()
    with listening_sockets(address, processes) as sockets, multiprocess_metrics.multiproc_dir() as metrics_dir:
        supervised = [
            SupervisedProcess(
                f"{arguments[0]} {number}",
                arguments,
                listener=listener,
                metrics_dir=metrics_dir,
                stop_timeout=stop_timeout,
            )
            for number, listener in enumerate(sockets, 1)
        ]
        rolling: asyncio.Task[None] | None = None
        try:
            for process in supervised:
                process.start()
            log.info("processes started", command=arguments[0], processes=processes)
            while not stop.is_set():
                for process in supervised:
                    process.poll(time.monotonic())
                if reload.is_set() and (rolling is None or rolling.done()):
                    reload.clear()
                    rolling = asyncio.ensure_future(rolling_restart(supervised))
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(POLL_INTERVAL_SECONDS):
                        await stop.wait()
        finally:
            log.info("processes stopping", command=arguments[0])
            if rolling is not None:
                rolling.cancel()
                await asyncio.gather(rolling, return_exceptions=True)
            codes = await stop_all(
                [child for process in supervised for child in process.children], stop_timeout=stop_timeout
            )
    log.info("processes stopped", command=arguments[0])
    return max(codes, default=0)


async def rolling_restart(supervised: Sequence["SupervisedProcess"]) -> None:
    """Replace the processes one after the other; abort if a new one does not become ready."""
    log.info("processes restarting", processes=len(supervised))
    for process in supervised:
        if not await process.replace():
            log.error("rolling restart aborted: new process not ready", process=process.name)
            return
    log.info("processes restarted", processes=len(supervised))


class SupervisedProcess:
    """One process and its successors; restarts after early exits back off exponentially."""

    def __init__(
        self,
        name: str,
        arguments: Sequence[str],
        *,
        listener: socket.socket | None,
        metrics_dir: str,
        stop_timeout: float,
    ) -> None:
        self.name = name
        self._arguments = [*arguments, "--supervised", *(("--listener", str(listener.fileno())) if listener else ())]
        self._listener = listener
        self._metrics_dir = metrics_dir
        self._stop_timeout = stop_timeout
        self._current: Child | None = None
        self._successor: Child | None = None  # not ready yet
        self._draining: Child | None = None
        self._started_at = 0.0
        self._backoff = 0.0
        self._restart_at: float | None = None

    @property
    def children(self) -> list[Child]:
        return [child for child in (self._current, self._successor, self._draining) if child]

    def start(self) -> None:
        self._started_at, self._restart_at = time.monotonic(), None
        self._current = self._launch()

    def poll(self, now: float) -> None:
        if self._current is None or self._current.alive or self._successor:
            return  # a rolling restart is replacing it already
        if self._restart_at is None:
            self._schedule_restart(self._current, now)
        elif now >= self._restart_at:
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
            if not await _wait_ready(reading):
                new.kill()
                self._successor = None
                multiprocess_metrics.remove_dead_process(self._metrics_dir, new.last_pid)
                return False
        finally:
            os.close(reading)
        self._draining, self._current, self._successor = self._current, new, None
        self._started_at, self._restart_at, self._backoff = time.monotonic(), None, 0.0
        if self._draining is not None:
            self._draining.send_stop_signal(signal.SIGHUP)  # stop accepting connections: the successor has them
            await _wait_or_kill(self._draining, seconds=self._stop_timeout)
            multiprocess_metrics.remove_dead_process(self._metrics_dir, self._draining.last_pid)
            self._draining = None
        return True

    def _launch(self, *options: str, inherit: tuple[int, ...] = ()) -> Child:
        child = Child(
            self.name,
            [sys.executable, sys.argv[0], *self._arguments, *options],
            parent_death_signal=signal.SIGTERM,  # an orphan drains; nothing is lost if it cannot
            inherit=(*inherit, *((self._listener.fileno(),) if self._listener else ())),
            environment=child_environment(PROMETHEUS_MULTIPROC_DIR=self._metrics_dir),
        )
        child.start()
        return child

    def _schedule_restart(self, dead: Child, now: float) -> None:
        if now - self._started_at > BACKOFF_RESET_SECONDS:
            self._backoff = 0.0
        self._restart_at = now + self._backoff
        multiprocess_metrics.remove_dead_process(self._metrics_dir, dead.last_pid)
        log.warning("process died", process=self.name, code=dead.exit_code, retry_in=self._backoff)
        self._backoff = min(max(self._backoff * 2, MIN_BACKOFF_SECONDS), MAX_BACKOFF_SECONDS)


async def _wait_ready(pipe: int) -> bool:
    loop = asyncio.get_running_loop()
    readable = asyncio.Event()
    loop.add_reader(pipe, readable.set)
    try:
        async with asyncio.timeout(READY_TIMEOUT_SECONDS):
            await readable.wait()
    except TimeoutError:
        return False
    finally:
        loop.remove_reader(pipe)
    return os.read(pipe, 1) != b""  # empty at the end of the pipe: the process exited


async def stop_all(children: Sequence[Child], *, stop_timeout: float) -> list[int]:
    """Send the stop signal to all, wait, kill those that reach the timeout; return the exit codes."""
    running = [child for child in children if child.alive]
    for child in running:
        child.send_stop_signal()
    deadline = time.monotonic() + stop_timeout
    for child in running:
        await _wait_or_kill(child, seconds=max(0.0, deadline - time.monotonic()))
    # A process that got SIGTERM before it installed its signal handlers has stopped properly, too.
    return [abs(child.exit_code or 0) for child in running if child.exit_code != -signal.SIGTERM]


async def _wait_or_kill(child: Child, *, seconds: float) -> None:
    if not await asyncio.to_thread(child.wait, timeout=seconds):
        log.error("process killed after stop timeout", process=child.name, seconds=round(seconds, 1))


@contextlib.contextmanager
def listening_sockets(address: tuple[str, int] | None, number: int) -> Iterator[Sequence[socket.socket | None]]:
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
            with _bind(family, resolved, reuse_port=False) as probe:
                resolved = probe.getsockname()
            sockets = [stack.enter_context(_bind(family, resolved, reuse_port=True)) for _ in range(number)]
            for listener in sockets:
                listener.listen(LISTEN_BACKLOG)
        except OSError as error:
            raise SettingsError(f"Cannot listen on {authority(*address)}: {error.strerror}") from error
        yield sockets


def _bind(family: int, address: tuple[object, ...], *, reuse_port: bool) -> socket.socket:
    listener = socket.socket(family, socket.SOCK_STREAM)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        if reuse_port:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        listener.bind(address)
    except OSError:
        listener.close()
        raise
    return listener
