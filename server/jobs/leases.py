"""The attempts that this worker runs: their leases, and who tells them to stop."""

import asyncio
import math
import time
from collections.abc import Coroutine, Iterator
from contextlib import contextmanager
from typing import Any, Literal, TypeVar

import structlog
from pymongo.errors import PyMongoError

from server.jobs import store

log = structlog.get_logger()

LOOK_SECONDS = 1.0  # a claim that is lost is noticed within this time and two answers of MongoDB
RENEW_EVERY = 2  # looks

Why = Literal["lost", "stopping"]
T = TypeVar("T")


class Held:
    """An attempt and the task that works on it, once it is claimed."""

    def __init__(self, job: str, claim: int) -> None:
        self.job, self.claim = job, claim
        self.work: asyncio.Future[Any] | None = None
        self.why: Why | None = None

    async def run(self, work: Coroutine[Any, Any, T]) -> T:
        """Raises CancelledError where it is, or was, to stop."""
        self.work = asyncio.ensure_future(work)
        if self.why:
            self.work.cancel()
        result: T = await self.work
        return result

    def stop(self, why: Why) -> None:
        self.why = self.why or why
        if self.work is not None:
            self.work.cancel()


class Answers:
    """Since when MongoDB answers this worker without a break: one that was longer may have ended leases of workers
    that live, and they are given the time to renew them."""

    BREAK_SECONDS = 4.0  # shorter than what a lease outlives a renewal
    STEADY_SECONDS = 5.0  # longer than it takes to renew one: a call that fails, a look and a call

    def __init__(self) -> None:
        self._since = self._last = -math.inf

    def note(self, now: float) -> None:
        if now - self._last > self.BREAK_SECONDS:
            self._since = now
        self._last = now

    def are_steady(self, now: float) -> bool:
        return now - self._last <= self.BREAK_SECONDS and now - self._since >= self.STEADY_SECONDS


class Leases:
    def __init__(self, mongo: Any, *, worker: str) -> None:
        self._mongo = mongo
        self._worker = worker
        self._held: set[Held] = set()
        self._none = asyncio.Event()
        self._none.set()
        self._answers = Answers()

    @contextmanager
    def hold(self, job: str, claim: int) -> Iterator[Held]:
        """To be entered before it is claimed: a worker that stops waits for it. A job may be held twice, while an
        attempt that was lost is ending."""
        held = Held(job, claim)
        self._held.add(held)
        self._none.clear()
        try:
            yield held
        finally:
            self._held.remove(held)
            if not self._held:
                self._none.set()

    def can_judge(self) -> bool:
        """Whether a lease that has run out means that its worker is lost."""
        return self._answers.are_steady(time.monotonic())

    def drop(self, job: str) -> None:
        """The job is cancelled: its attempt, if it is here, stops at once."""
        for held in self._held:
            if held.job == job:
                held.stop("lost")

    def stop_all(self) -> None:
        for held in self._held:
            held.stop("stopping")

    async def until_none(self, *, seconds: float) -> bool:
        """Whether all attempts ended in time."""
        try:
            async with asyncio.timeout(seconds):
                await self._none.wait()
        except TimeoutError:
            return False
        return True

    async def keep(self) -> None:
        """For as long as the worker lives. While MongoDB is away nothing is stopped: the fence decides afterwards."""
        look = 0
        while True:
            await asyncio.sleep(LOOK_SECONDS)
            look += 1
            try:
                await self._look(renew=look % RENEW_EVERY == 0)
                self._answers.note(time.monotonic())
            except PyMongoError as error:
                log.warning("leases not renewed", attempts=len(self._held), error=str(error))
                look = -1  # renew as soon as it answers, before somebody takes them for lost

    async def _look(self, *, renew: bool) -> None:
        held = [each for each in self._held if each.work]  # what comes later may not be claimed yet
        jobs = {each.job for each in held}
        if renew and jobs:
            await store.renew(self._mongo, jobs=jobs, worker=self._worker, now=store.moment())
        claims = await store.claims(self._mongo, jobs=jobs, worker=self._worker)
        for each in held:
            if claims.get(each.job) != each.claim:
                each.stop("lost")
