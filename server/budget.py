"""How long a request may wait for its stores: each call has a limit of its own, or what is left where that is less.

So however many calls a request makes, and however slow a store is, the answer comes in time. What is not the stores'
time does not count: a client that sends its body slowly, or a password's hash. What outlives the request (a task that
it started) has the calls' own limits again.
"""

import asyncio
import contextlib
from collections.abc import Iterator
from contextvars import ContextVar

LEAST_SECONDS = 0.02  # also for the last call: to say that a store is away takes no longer


class Budget:
    def __init__(self, deadline: float) -> None:
        self.deadline = deadline
        self.over = False


_BUDGET: ContextVar[Budget | None] = ContextVar("budget", default=None)


@contextlib.contextmanager
def budget(seconds: float) -> Iterator[None]:
    """For all store calls inside."""
    mine = Budget(asyncio.get_running_loop().time() + seconds)
    token = _BUDGET.set(mine)
    try:
        yield
    finally:
        mine.over = True
        _BUDGET.reset(token)


@contextlib.contextmanager
def uncounted() -> Iterator[None]:
    """For a wait that no store is to blame for."""
    mine, began = _BUDGET.get(), asyncio.get_running_loop().time()
    try:
        yield
    finally:
        if mine is not None:
            mine.deadline += asyncio.get_running_loop().time() - began


def within(limit: float) -> float:
    """The seconds that a call with this limit may take."""
    mine = _BUDGET.get()
    if mine is None or mine.over:
        return limit
    return max(LEAST_SECONDS, min(limit, mine.deadline - asyncio.get_running_loop().time()))
