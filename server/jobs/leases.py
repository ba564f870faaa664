"""The leases of the attempts that this worker runs: renewal, expiry and stopping."""

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

LOOK_SECONDS = 1.0  # a lost claim is detected within this time and two responses of MongoDB
RENEW_EVERY = 2  # checks

Why = Literal["lost", "stopping"]
T = TypeVar("T")


class Held:
    """The lease of an attempt, and the task that runs the attempt once it is claimed."""

    def __init__(self, job: str, claim: int) -> None:
        self.job, self.claim = job, claim
        self.work: asyncio.Future[Any] | None = None
        self.why: Why | None = None

    async def run(self, work: Coroutine[Any, Any, T]) -> T:
        """Run the attempt as a task.

        Raises:
            CancelledError: the attempt is stopped, or was stopped before this call.
        """
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
    """The time since which MongoDB responds to this worker without a gap.

    A longer gap may have expired the leases of running workers, which then get time to renew them.
    """

    BREAK_SECONDS = 4.0  # shorter than the time from a renewal to the expiry of a lease
    STEADY_SECONDS = 5.0  # longer than a renewal: one failed call, one check interval and one call

    def __init__(self) -> None:
        self._since = self._last = -math.inf

    def note(self, now: float) -> None:
        if now - self._last > self.BREAK_SECONDS:
            self._since = now
        self._last = now

    def are_steady(self, now: float) -> bool:
        return now - self._last <= self.BREAK_SECONDS and now - self._since >= self.STEADY_SECONDS


class Leases:
    """The leases that this worker holds."""

    def __init__(self, mongo: Any, *, worker: str) -> None:
        self._mongo = mongo
        self._worker = worker
        self._held: set[Held] = set()
        self._none = asyncio.Event()
        self._none.set()
        self._answers = Answers()

    @contextmanager
    def hold(self, job: str, claim: int) -> Iterator[Held]:
        """Register an attempt, before it is claimed: graceful shutdown waits for it.

        A job may be held twice while an earlier attempt, whose claim is lost, is still ending.
        """
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
        """Return whether an expired lease means that its worker is lost."""
        return self._answers.are_steady(time.monotonic())

    def drop(self, job: str) -> None:
        """Stop the attempt of a cancelled job at once, if this worker runs it."""
        for held in self._held:
            if held.job == job:
                held.stop("lost")

    def stop_all(self) -> None:
        """Stop all attempts for the shutdown of the worker."""
        for held in self._held:
            held.stop("stopping")

    async def until_none(self, *, seconds: float) -> bool:
        """Wait until all attempts have ended; return whether they did in time."""
        try:
            async with asyncio.timeout(seconds):
                await self._none.wait()
        except TimeoutError:
            return False
        return True

    async def keep(self) -> None:
        """Renew and check the leases until cancelled.

        An outage of MongoDB stops no attempt: the fence decides afterwards which attempts still hold their claims.
        """
        checks = 0
        while True:
            await asyncio.sleep(LOOK_SECONDS)
            checks += 1
            try:
                await self._look(renew=checks % RENEW_EVERY == 0)
                self._answers.note(time.monotonic())
            except PyMongoError as error:
                log.warning("leases not renewed", attempts=len(self._held), error=str(error))
                checks = -1  # renew as soon as MongoDB responds, before another worker reclaims the jobs

    async def _look(self, *, renew: bool) -> None:
        leases = [lease for lease in self._held if lease.work]  # those without a task may not be claimed yet
        jobs = {lease.job for lease in leases}
        if renew and jobs:
            await store.renew(self._mongo, jobs=jobs, worker=self._worker, now=store.moment())
        claims = await store.claims(self._mongo, jobs=jobs, worker=self._worker)
        for lease in leases:
            if claims.get(lease.job) != lease.claim:
                lease.stop("lost")
