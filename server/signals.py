"""Signals of a process: SIGTERM and SIGINT start a graceful shutdown, SIGHUP hands over to a successor."""

import asyncio
import os
import signal

import structlog

log = structlog.get_logger()


class StopEvent(asyncio.Event):
    has_successor = False  # a successor has taken over and shares the listening socket


def watch_stop_signals(*, replaceable: bool = False) -> StopEvent:
    """Return an event that SIGTERM and SIGINT set, and SIGHUP if ``replaceable``.

    Else SIGHUP is ignored, because there is no successor. Call it inside the running loop.
    """
    stop, loop = StopEvent(), asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)

    def on_sighup() -> None:
        if replaceable:
            stop.has_successor = True
            stop.set()
        else:
            log.warning("SIGHUP ignored: no supervisor to start a successor")

    loop.add_signal_handler(signal.SIGHUP, on_sighup)
    return stop


def watch_reload_signal() -> asyncio.Event:
    """Return an event that SIGHUP sets."""
    reload = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGHUP, reload.set)
    return reload


def notify_ready(pipe: int | None) -> None:
    """Report readiness to the supervisor, if there is one."""
    if pipe is not None:
        os.write(pipe, b"1")
        os.close(pipe)
