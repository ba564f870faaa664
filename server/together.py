"""Batching of requests to a store, as DataLoader does.

A round trip costs more processor time than the request that it carries; so requests that are submitted in one
iteration of the event loop, or while other round trips are running, share a batch.
"""

import asyncio
import math
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from contextlib import AbstractAsyncContextManager
from contextvars import Context
from dataclasses import dataclass
from typing import Generic, TypeVar

ROUND_TRIPS = 4  # each with its own connection
TOGETHER = 128  # requests in a batch
MOST_WAITING = 8192
LOOK_SECONDS = 0.05  # one timer checks all timeouts: a timer for each request would cost more than its result

Q = TypeVar("Q")
A = TypeVar("A")


@dataclass(slots=True)
class _Patience:
    deadline: float
    silence: float  # in checks
    since: int  # the number of the last check before the request


Send = Callable[[list[Q]], Awaitable[Sequence[A | BaseException]]]
"""Sends a batch to the store, within its own timeout, and returns a result or an error for each request. An exception
that it raises is the result of all of them."""


class Together(Generic[Q, A]):
    def __init__(
        self,
        connect: Callable[[], AbstractAsyncContextManager[Send[Q, A]]],
        *,
        round_trips: int = ROUND_TRIPS,
        together: int = TOGETHER,
    ) -> None:
        """Enter ``connect`` for successive batches, until the queue is empty or a batch fails.

        At most ``max_concurrent`` batches run at once, each with at most ``max_batch`` requests.
        """
        self._connect = connect
        self._round_trips, self._together = round_trips, together
        self._waiting: deque[tuple[Q, asyncio.Future[A]]] = deque()
        self._under_way: set[asyncio.Task[None]] = set()
        self._starting = False
        self._open: dict[asyncio.Future[A], _Patience] = {}
        self._looks = 0
        self._silent_looks = 0  # since the last result
        self._timer: asyncio.TimerHandle | None = None

    def ask(self, question: Q, *, seconds: float, silence: float = math.inf) -> "asyncio.Future[A]":
        """Submit a request and return the future of its result.

        The future raises TimeoutError after ``timeout`` seconds, or after ``stall_timeout`` seconds in which no request
        got a result. A long queue and a busy event loop do not count as a stall.
        """
        loop = asyncio.get_running_loop()
        future: asyncio.Future[A] = loop.create_future()
        if len(self._waiting) >= MOST_WAITING:
            future.set_exception(TimeoutError("Too many pending requests"))
            return future
        self._waiting.append((question, future))
        self._open[future] = _Patience(loop.time() + seconds, silence / LOOK_SECONDS, self._looks)
        if not self._starting:
            self._starting = True
            loop.call_soon(self._start)
        if self._timer is None:
            self._silent_looks = 0
            self._timer = loop.call_later(LOOK_SECONDS, self._look)
        return future

    async def close(self) -> None:
        for future in self._open:
            future.cancel()
        for task in self._under_way:
            task.cancel()
        await asyncio.gather(*self._under_way, return_exceptions=True)
        if self._timer is not None:
            self._timer.cancel()

    def _start(self) -> None:
        self._starting = False
        batches = math.ceil(len(self._waiting) / self._together)
        for _ in range(min(batches, self._round_trips - len(self._under_way))):
            # Without the context of the first request: the deadline of that request would apply to all others.
            task = asyncio.get_running_loop().create_task(self._serve(), context=Context())
            self._under_way.add(task)
            task.add_done_callback(self._ended)

    def _ended(self, task: "asyncio.Task[None]") -> None:
        self._under_way.discard(task)
        if not task.cancelled() and self._waiting:
            self._start()

    async def _serve(self) -> None:
        batch: list[tuple[Q, asyncio.Future[A]]] = []
        try:
            async with self._connect() as send:
                while batch := self._next():
                    self._answer(batch, await send([question for question, _ in batch]))
                    self._silent_looks = 0
        except Exception as error:  # noqa: BLE001 - the requests' futures raise it
            batch = batch or self._next()
            self._answer(batch, [error] * len(batch))

    def _next(self) -> list[tuple[Q, "asyncio.Future[A]"]]:
        batch: list[tuple[Q, asyncio.Future[A]]] = []
        while self._waiting and len(batch) < self._together:
            entry = self._waiting.popleft()
            if not entry[1].done():  # skip requests that were cancelled or timed out meanwhile
                batch.append(entry)
        return batch

    def _answer(self, batch: list[tuple[Q, "asyncio.Future[A]"]], results: Sequence[A | BaseException]) -> None:
        for (_, future), result in zip(batch, results, strict=True):
            self._open.pop(future, None)
            if future.done():
                continue
            if isinstance(result, BaseException):
                future.set_exception(result)
            else:
                future.set_result(result)

    def _look(self) -> None:
        loop = asyncio.get_running_loop()
        now = loop.time()
        self._looks += 1
        self._silent_looks += 1
        for future, waiter in list(self._open.items()):
            if future.done():
                del self._open[future]
            elif now >= waiter.deadline or self._silence(waiter) >= waiter.silence:
                del self._open[future]
                future.set_exception(TimeoutError("No answer in time"))
        self._timer = loop.call_later(LOOK_SECONDS, self._look) if self._open else None

    def _silence(self, waiter: _Patience) -> int:
        return min(self._silent_looks, self._looks - waiter.since)
