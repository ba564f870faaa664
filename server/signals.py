"""Signals of a process: SIGTERM and SIGINT start a graceful shutdown, SIGHUP hands over to a successor."""

import asyncio
import os
import signal

import structlog

log = structlog.get_logger()


class Stop(asyncio.Event):
    replaced = False  # a successor has taken over and shares the listening socket


def stop_signal(*, replaceable: bool = False) -> Stop:
    """Return an event that SIGTERM and SIGINT set, and SIGHUP if ``replaceable``.

    Else SIGHUP is ignored, because there is no successor. Call it inside the running loop.
    """
    stop, loop = Stop(), asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)

    def make_room() -> None:
        if replaceable:
            stop.replaced = True
            stop.set()
        else:
            log.warning("SIGHUP ignored: only with --processes there is a successor")

    loop.add_signal_handler(signal.SIGHUP, make_room)
    return stop


def reload_signal() -> asyncio.Event:
    """Return an event that SIGHUP sets."""
    reload = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGHUP, reload.set)
    return reload


def tell_ready(pipe: int | None) -> None:
    """Report readiness to the supervisor, if there is one."""
    if pipe is not None:
        os.write(pipe, b"1")
        os.close(pipe)
