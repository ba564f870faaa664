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

MAX_CONCURRENT_BATCHES = 4  # each with its own connection
MAX_BATCH = 128  # requests in a batch
MAX_PENDING = 8192  # backpressure: a request beyond it fails at once
# One timer checks all timeouts: a timer for each request would cost more than its result.
TIMEOUT_CHECK_INTERVAL_SECONDS = 0.05

RequestT = TypeVar("RequestT")
ResultT = TypeVar("ResultT")


@dataclass(slots=True)
class _Waiter:
    deadline: float
    stall_checks: float  # the stall timeout, as a number of checks
    submitted_at: int  # the number of checks before the request


SendBatch = Callable[[list[RequestT]], Awaitable[Sequence[ResultT | BaseException]]]
"""Send a batch to the store, within its own timeout, and return a result or an error for each request.

An exception that it raises is the result of all of them.
"""


class Batcher(Generic[RequestT, ResultT]):
    """Sends the requests of many callers in batches, over a few connections at once."""

    def __init__(
        self,
        connect: Callable[[], AbstractAsyncContextManager[SendBatch[RequestT, ResultT]]],
        *,
        max_concurrent: int = MAX_CONCURRENT_BATCHES,
        max_batch: int = MAX_BATCH,
    ) -> None:
        """Enter ``connect`` for successive batches, until the queue is empty or a batch fails.

        At most ``max_concurrent`` batches run at once, each with at most ``max_batch`` requests.
        """
        self._connect = connect
        self._max_concurrent, self._max_batch = max_concurrent, max_batch
        self._queue: deque[tuple[RequestT, asyncio.Future[ResultT]]] = deque()
        self._running: set[asyncio.Task[None]] = set()
        self._start_scheduled = False
        self._waiters: dict[asyncio.Future[ResultT], _Waiter] = {}
        self._checks = 0
        self._checks_since_result = 0
        self._timer: asyncio.TimerHandle | None = None

    def submit(
        self, request: RequestT, *, timeout: float, stall_timeout: float = math.inf
    ) -> "asyncio.Future[ResultT]":
        """Submit a request and return the future of its result.

        The future raises TimeoutError after ``timeout`` seconds, after ``stall_timeout`` seconds in which no request
        got a result, or at once if too many requests are pending. A long queue and a busy event loop are no stall.
        """
        loop = asyncio.get_running_loop()
        future: asyncio.Future[ResultT] = loop.create_future()
        if len(self._queue) >= MAX_PENDING:
            future.set_exception(TimeoutError("Too many pending requests"))
            return future
        self._queue.append((request, future))
        self._waiters[future] = _Waiter(
            loop.time() + timeout, stall_timeout / TIMEOUT_CHECK_INTERVAL_SECONDS, self._checks
        )
        if not self._start_scheduled:
            self._start_scheduled = True
            loop.call_soon(self._start)
        if self._timer is None:
            self._checks_since_result = 0
            self._timer = loop.call_later(TIMEOUT_CHECK_INTERVAL_SECONDS, self._check_timeouts)
        return future

    async def close(self) -> None:
        for future in self._waiters:
            future.cancel()
        for task in self._running:
            task.cancel()
        await asyncio.gather(*self._running, return_exceptions=True)
        if self._timer is not None:
            self._timer.cancel()

    def _start(self) -> None:
        self._start_scheduled = False
        batches = math.ceil(len(self._queue) / self._max_batch)
        for _ in range(min(batches, self._max_concurrent - len(self._running))):
            # Without the context of the first request: the deadline of that request would apply to all others.
            task = asyncio.get_running_loop().create_task(self._run_batches(), context=Context())
            self._running.add(task)
            task.add_done_callback(self._on_batch_done)

    def _on_batch_done(self, task: "asyncio.Task[None]") -> None:
        self._running.discard(task)
        if not task.cancelled() and self._queue:
            self._start()

    async def _run_batches(self) -> None:
        batch: list[tuple[RequestT, asyncio.Future[ResultT]]] = []
        try:
            async with self._connect() as send:
                while batch := self._next_batch():
                    self._set_results(batch, await send([request for request, _ in batch]))
                    self._checks_since_result = 0
        except Exception as error:  # noqa: BLE001 - the requests' futures raise it
            batch = batch or self._next_batch()
            self._set_results(batch, [error] * len(batch))

    def _next_batch(self) -> list[tuple[RequestT, "asyncio.Future[ResultT]"]]:
        batch: list[tuple[RequestT, asyncio.Future[ResultT]]] = []
        while self._queue and len(batch) < self._max_batch:
            entry = self._queue.popleft()
            if not entry[1].done():  # skip requests that were cancelled or timed out meanwhile
                batch.append(entry)
        return batch

    def _set_results(
        self, batch: list[tuple[RequestT, "asyncio.Future[ResultT]"]], results: Sequence[ResultT | BaseException]
    ) -> None:
        for (_, future), result in zip(batch, results, strict=True):
            self._waiters.pop(future, None)
            if future.done():
                continue
            if isinstance(result, BaseException):
                future.set_exception(result)
            else:
                future.set_result(result)

    def _check_timeouts(self) -> None:
        loop = asyncio.get_running_loop()
        now = loop.time()
        self._checks += 1
        self._checks_since_result += 1
        for future, waiter in list(self._waiters.items()):
            if future.done():
                del self._waiters[future]
            elif now >= waiter.deadline or self._checks_without_result(waiter) >= waiter.stall_checks:
                del self._waiters[future]
                future.set_exception(TimeoutError("No answer in time"))
        self._timer = loop.call_later(TIMEOUT_CHECK_INTERVAL_SECONDS, self._check_timeouts) if self._waiters else None

    def _checks_without_result(self, waiter: _Waiter) -> int:
        return min(self._checks_since_result, self._checks - waiter.submitted_at)
