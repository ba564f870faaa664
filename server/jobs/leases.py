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

LEASE_CHECK_INTERVAL_SECONDS = 1.0  # a lost claim is detected after this time and two calls of MongoDB at the latest
CHECKS_PER_RENEWAL = 2

StopReason = Literal["lost", "stopping"]
T = TypeVar("T")


class HeldLease:
    """The lease of an attempt, and the task that runs the attempt once it is claimed."""

    def __init__(self, job: str, claim: int) -> None:
        self.job, self.claim = job, claim
        self.task: asyncio.Future[Any] | None = None
        self.stop_reason: StopReason | None = None

    async def run(self, work: Coroutine[Any, Any, T]) -> T:
        """Run the attempt as a task.

        Raises:
            CancelledError: the attempt is stopped, or was stopped before this call.
        """
        self.task = asyncio.ensure_future(work)
        if self.stop_reason:
            self.task.cancel()
        result: T = await self.task
        return result

    def stop(self, reason: StopReason) -> None:
        self.stop_reason = self.stop_reason or reason
        if self.task is not None:
            self.task.cancel()


class MongoAvailability:
    """The time since which MongoDB has responded to this worker without a gap.

    During a gap, leases may expire although their workers run. After it, these workers get time to renew them.
    """

    MAX_GAP_SECONDS = 4.0  # shorter than the time from a renewal to the expiry of a lease
    MIN_STABLE_SECONDS = 5.0  # longer than a renewal: one failed call, one check interval and one call

    def __init__(self) -> None:
        self._available_since = self._last_response_at = -math.inf

    def record_response(self, now: float) -> None:
        if now - self._last_response_at > self.MAX_GAP_SECONDS:
            self._available_since = now
        self._last_response_at = now

    def is_stable(self, now: float) -> bool:
        return (
            now - self._last_response_at <= self.MAX_GAP_SECONDS
            and now - self._available_since >= self.MIN_STABLE_SECONDS
        )


class Leases:
    """The leases that this worker holds."""

    def __init__(self, mongo: Any, *, worker: str) -> None:
        self._mongo = mongo
        self._worker = worker
        self._held: set[HeldLease] = set()
        self._idle = asyncio.Event()
        self._idle.set()
        self._mongo_availability = MongoAvailability()

    @contextmanager
    def hold(self, job: str, claim: int) -> Iterator[HeldLease]:
        """Register an attempt, before it is claimed: graceful shutdown waits for it.

        A job may be held twice while an earlier attempt, whose claim is lost, is still ending.
        """
        held = HeldLease(job, claim)
        self._held.add(held)
        self._idle.clear()
        try:
            yield held
        finally:
            self._held.remove(held)
            if not self._held:
                self._idle.set()

    def can_reclaim(self) -> bool:
        """Return whether an expired lease means that its worker is lost."""
        return self._mongo_availability.is_stable(time.monotonic())

    def cancel(self, job: str) -> None:
        """Stop the attempt of a cancelled job at once, if this worker runs it: the cancellation has ended its claim."""
        for held in self._held:
            if held.job == job:
                held.stop("lost")

    def stop_all(self) -> None:
        """Stop all attempts for the shutdown of the worker."""
        for held in self._held:
            held.stop("stopping")

    async def wait_idle(self, *, timeout: float) -> bool:
        """Wait until all attempts have ended; return whether they did in time."""
        try:
            async with asyncio.timeout(timeout):
                await self._idle.wait()
        except TimeoutError:
            return False
        return True

    async def renew_forever(self) -> None:
        """Renew and check the leases until cancelled.

        An outage of MongoDB stops no attempt: the fence decides afterwards which attempts still hold their claims.
        """
        checks = 0
        while True:
            await asyncio.sleep(LEASE_CHECK_INTERVAL_SECONDS)
            checks += 1
            try:
                await self._check(renew=checks % CHECKS_PER_RENEWAL == 0)
                self._mongo_availability.record_response(time.monotonic())
            except PyMongoError as error:
                log.warning("leases not renewed", attempts=len(self._held), error=str(error))
                checks = -1  # renew as soon as MongoDB responds, before another worker reclaims the jobs

    async def _check(self, *, renew: bool) -> None:
        leases = [lease for lease in self._held if lease.task]  # those without a task may not be claimed yet
        jobs = {lease.job for lease in leases}
        if renew and jobs:
            await store.renew_leases(self._mongo, jobs=jobs, worker=self._worker, now=store.mongo_now())
        claims = await store.read_held_claims(self._mongo, jobs=jobs, worker=self._worker)
        for lease in leases:
            if claims.get(lease.job) != lease.claim:
                lease.stop("lost")
