"""The attempts that this worker runs: their leases, and who tells them to stop."""

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

import structlog
from pymongo.errors import PyMongoError

from server.jobs import store

log = structlog.get_logger()

LOOK_SECONDS = 1.0  # a claim that is lost is noticed within this time and two answers of MongoDB
RENEW_EVERY = 2  # looks

Why = Literal["lost", "stopping"]


class Held:
    """An attempt and the task that works on it."""

    def __init__(self, job: str, claim: int) -> None:
        self.job, self.claim = job, claim
        self.work: asyncio.Future[Any] | None = None
        self.why: Why | None = None

    def stop(self, why: Why) -> None:
        self.why = self.why or why
        if self.work is not None:
            self.work.cancel()


class Leases:
    def __init__(self, mongo: Any, *, worker: str) -> None:
        self._mongo = mongo
        self._worker = worker
        self._held: dict[str, Held] = {}
        self._none = asyncio.Event()
        self._none.set()

    @contextmanager
    def hold(self, job: str, claim: int) -> Iterator[Held]:
        held = self._held[job] = Held(job, claim)
        self._none.clear()
        try:
            yield held
        finally:
            if self._held.get(job) is held:  # else it was lost, and came again while the old attempt was ending
                del self._held[job]
            if not self._held:
                self._none.set()

    def drop(self, job: str) -> None:
        """The job is cancelled: its attempt, if it is here, stops at once."""
        if held := self._held.get(job):
            held.stop("lost")

    def stop_all(self) -> None:
        for held in list(self._held.values()):
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
            if not self._held:
                continue
            look += 1
            try:
                await self._look(renew=look % RENEW_EVERY == 0)
            except PyMongoError as error:
                log.warning("leases not renewed", attempts=len(self._held), error=str(error))
                look = -1  # renew as soon as it answers, before somebody takes them for lost

    async def _look(self, *, renew: bool) -> None:
        held = dict(self._held)  # what comes later may not be there yet
        if renew:
            await store.renew(self._mongo, jobs=held, worker=self._worker, now=store.moment())
        claims = await store.claims(self._mongo, jobs=held, worker=self._worker)
        for job, each in held.items():
            if claims.get(job) != each.claim and self._held.get(job) is each:
                each.stop("lost")
