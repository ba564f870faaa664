"""Signals of a process: SIGTERM and SIGINT ask it to stop."""

import asyncio
import signal


def stop_signal() -> asyncio.Event:
    """Set at the first SIGTERM or SIGINT. To be called inside the running loop."""
    stop, loop = asyncio.Event(), asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    return stop
