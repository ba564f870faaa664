"""What a process is told by signals: SIGTERM and SIGINT ask it to stop, SIGHUP to make room for its successor."""

import asyncio
import os
import signal

import structlog

log = structlog.get_logger()


class Stop(asyncio.Event):
    replaced = False  # a successor has taken over: it has our listening socket, too


def stop_signal(*, replaceable: bool = False) -> Stop:
    """Set at the first SIGTERM or SIGINT, or SIGHUP where replaceable; else that is ignored: nobody would take over.

    To be called inside the running loop.
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
    """Set at SIGHUP."""
    reload = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGHUP, reload.set)
    return reload


def tell_ready(pipe: int | None) -> None:
    """To the supervisor, where there is one that waits."""
    if pipe is not None:
        os.write(pipe, b"1")
        os.close(pipe)
