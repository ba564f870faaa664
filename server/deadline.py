"""A request's deadline for its store calls: each call gets its own timeout or the remaining time, whichever is less.

So the response comes in time, however many calls a request makes and however slow a store is. Other waits do not
count: a client that sends its body slowly, or the hash of a password. A task that outlives the request gets the
calls' own timeouts again.
"""

import asyncio
import contextlib
from collections.abc import Iterator
from contextvars import ContextVar

MIN_TIMEOUT_SECONDS = 0.02  # of a call past the deadline: enough for the error that the store is unavailable


class Deadline:
    def __init__(self, at: float) -> None:
        self.at = at  # in the time of the event loop
        self.ended = False


_CURRENT: ContextVar[Deadline | None] = ContextVar("deadline", default=None)


@contextlib.contextmanager
def store_deadline(seconds: float) -> Iterator[None]:
    """Set the deadline of all store calls inside the block, in seconds from now."""
    current = Deadline(asyncio.get_running_loop().time() + seconds)
    token = _CURRENT.set(current)
    try:
        yield
    finally:
        current.ended = True
        _CURRENT.reset(token)


@contextlib.contextmanager
def paused() -> Iterator[None]:
    """Extend the deadline by the time that the block takes: a wait that no store causes."""
    current, started = _CURRENT.get(), asyncio.get_running_loop().time()
    try:
        yield
    finally:
        if current is not None:
            current.at += asyncio.get_running_loop().time() - started


def remaining(limit: float) -> float:
    """Return the seconds that a call with this timeout may take before the deadline."""
    current = _CURRENT.get()
    if current is None or current.ended:
        return limit
    return max(MIN_TIMEOUT_SECONDS, min(limit, current.at - asyncio.get_running_loop().time()))
