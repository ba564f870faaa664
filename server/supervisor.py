"""Several processes of one command: one that dies is replaced, a signal to stop reaches them all."""

import asyncio
import contextlib
import signal
import sys
import time
from collections.abc import Sequence

import structlog

from server.devstack.process import Child, StackError
from server.signals import stop_signal

log = structlog.get_logger()

LOOK_SECONDS = 0.2
FIRST_PAUSE, LONGEST_PAUSE = 1.0, 30.0
LONG_LIFE = 60.0  # who lived this long is replaced quickly


async def supervise(arguments: Sequence[str], *, processes: int, patience: float) -> int:
    """Run ``run.py ARGUMENTS`` so many times until SIGTERM or SIGINT; 0 where all of them ended well.

    ``patience`` is how long the processes may take to stop, in seconds; who needs more is killed.

    Raises:
        StackError: a process cannot be started at all.
    """
    stop = stop_signal()
    members = [Member(f"{arguments[0]} {number}", arguments) for number in range(1, processes + 1)]
    try:
        for each in members:
            each.start()
        log.info("processes started", command=arguments[0], processes=processes)
        while not stop.is_set():
            for each in members:
                each.look(time.monotonic())
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(LOOK_SECONDS):
                    await stop.wait()
    finally:
        log.info("processes stopping", command=arguments[0])
        codes = await end([each.child for each in members], patience=patience)
    log.info("processes stopped", command=arguments[0])
    return max(map(abs, codes), default=0)


class Member:
    """One process, started again each time a little later."""

    def __init__(self, name: str, arguments: Sequence[str]) -> None:
        # An orphan drains; nothing of it is lost if it cannot.
        self.child = Child(name, [sys.executable, sys.argv[0], *arguments], orphaned=signal.SIGTERM)
        self._started = 0.0
        self._pause = FIRST_PAUSE
        self._due: float | None = None

    def start(self) -> None:
        self._started, self._due = time.monotonic(), None
        self.child.start()

    def look(self, now: float) -> None:
        if self.child.alive:
            return
        if self._due is None:
            self._wait(now)
        elif now >= self._due:
            with contextlib.suppress(StackError):  # no process to be had: it is dead, and seen to be at the next look
                self.start()

    def _wait(self, now: float) -> None:
        if now - self._started > LONG_LIFE:
            self._pause = FIRST_PAUSE
        self._due = now + self._pause
        log.warning("process died", process=self.child.name, code=self.child.exit_code, again_in=self._pause)
        self._pause = min(self._pause * 2, LONGEST_PAUSE)


async def end(children: Sequence[Child], *, patience: float) -> list[int]:
    """Ask them all to stop and wait; their exit codes."""
    running = [each for each in children if each.alive]
    for each in running:
        each.ask_to_stop()
    deadline = time.monotonic() + patience
    for each in running:
        await asyncio.to_thread(each.wait, seconds=max(0.0, deadline - time.monotonic()))
    return [each.exit_code or 0 for each in running]
