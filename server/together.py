"""Questions of many requests, asked of a store together: what DataLoader and its kin do.

A round trip by itself costs more processor time than what it asks for; so what is asked in one turn of the loop, or
while other round trips are under way, goes together.
"""

import asyncio
import math
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from contextlib import AbstractAsyncContextManager
from contextvars import Context
from dataclasses import dataclass
from typing import Generic, TypeVar

ROUND_TRIPS = 4  # at once, of one connection each
TOGETHER = 128  # questions in a round trip
MOST_WAITING = 8192
LOOK_SECONDS = 0.05  # one look for all whose time is over: a timer for each would cost more than its answer

Q = TypeVar("Q")
A = TypeVar("A")


@dataclass(slots=True)
class _Patience:
    deadline: float
    silence: float  # looks
    since: int  # the number of the look before


Send = Callable[[list[Q]], Awaitable[Sequence[A | BaseException]]]
"""Takes questions to the store, within a time of its own, and returns an answer or an error to each. What it raises is
the answer to all of them."""


class Together(Generic[Q, A]):
    def __init__(
        self,
        connect: Callable[[], AbstractAsyncContextManager[Send[Q, A]]],
        *,
        round_trips: int = ROUND_TRIPS,
        together: int = TOGETHER,
    ) -> None:
        """``connect`` is entered for one round trip after the other, until nobody waits or one fails.

        At most ``round_trips`` are under way at once, each with so many questions ``together``.
        """
        self._connect = connect
        self._round_trips, self._together = round_trips, together
        self._waiting: deque[tuple[Q, asyncio.Future[A]]] = deque()
        self._under_way: set[asyncio.Task[None]] = set()
        self._starting = False
        self._open: dict[asyncio.Future[A], _Patience] = {}
        self._looks = 0
        self._silent_looks = 0  # since anybody was answered
        self._timer: asyncio.TimerHandle | None = None

    def ask(self, question: Q, *, seconds: float, silence: float = math.inf) -> "asyncio.Future[A]":
        """Asked now, to be awaited: TimeoutError after so many seconds, or so many in which nobody was answered.

        A crowd that waits for its turn, and a loop that is busy, are no silence.
        """
        loop = asyncio.get_running_loop()
        answer: asyncio.Future[A] = loop.create_future()
        if len(self._waiting) >= MOST_WAITING:
            answer.set_exception(TimeoutError("Too many others wait"))
            return answer
        self._waiting.append((question, answer))
        self._open[answer] = _Patience(loop.time() + seconds, silence / LOOK_SECONDS, self._looks)
        if not self._starting:
            self._starting = True
            loop.call_soon(self._start)
        if self._timer is None:
            self._silent_looks = 0
            self._timer = loop.call_later(LOOK_SECONDS, self._look)
        return answer

    async def close(self) -> None:
        for answer in self._open:
            answer.cancel()
        for task in self._under_way:
            task.cancel()
        await asyncio.gather(*self._under_way, return_exceptions=True)
        if self._timer is not None:
            self._timer.cancel()

    def _start(self) -> None:
        self._starting = False
        batches = math.ceil(len(self._waiting) / self._together)
        for _ in range(min(batches, self._round_trips - len(self._under_way))):
            # Without the context of whoever asked first: the others would wait under that one's budget.
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
        except Exception as error:  # noqa: BLE001 - it is theirs who asked
            batch = batch or self._next()
            self._answer(batch, [error] * len(batch))

    def _next(self) -> list[tuple[Q, "asyncio.Future[A]"]]:
        batch: list[tuple[Q, asyncio.Future[A]]] = []
        while self._waiting and len(batch) < self._together:
            each = self._waiting.popleft()
            if not each[1].done():  # who gave up in the meantime is not asked for any more
                batch.append(each)
        return batch

    def _answer(self, batch: list[tuple[Q, "asyncio.Future[A]"]], found: Sequence[A | BaseException]) -> None:
        for (_, answer), value in zip(batch, found, strict=True):
            self._open.pop(answer, None)
            if answer.done():
                continue
            if isinstance(value, BaseException):
                answer.set_exception(value)
            else:
                answer.set_result(value)

    def _look(self) -> None:
        loop = asyncio.get_running_loop()
        now = loop.time()
        self._looks += 1
        self._silent_looks += 1
        for answer, patience in list(self._open.items()):
            if answer.done():
                del self._open[answer]
            elif now >= patience.deadline or self._silence(patience) >= patience.silence:
                del self._open[answer]
                answer.set_exception(TimeoutError("No answer in time"))
        self._timer = loop.call_later(LOOK_SECONDS, self._look) if self._open else None

    def _silence(self, patience: _Patience) -> int:
        return min(self._silent_looks, self._looks - patience.since)
