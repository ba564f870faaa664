"""Fair shares: which of a user's jobs is queued next.

At most so many attempts of one user are queued or running, each in a slot of its record; the others wait as
records. Whoever frees a slot fills it: the end of an attempt, a cancel. Whoever adds a job that got no slot looks
for one afterwards. So one of the two sees the other, and what a killed process left is found by the reconciler.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import structlog
from pymongo.errors import PyMongoError
from redis.asyncio import Redis
from redis.exceptions import RedisError

from server.jobs import queue, store
from server.jobs.store import Job
from server.jobs.table import JobType

log = structlog.get_logger()

ROUNDS = 3  # who loses that often against others leaves the rest to them


class Dispatcher:
    def __init__(self, mongo: Any, redis: Redis, *, types: Mapping[str, JobType], slots: int) -> None:
        self.slots = slots
        self.lanes = queue.lanes(redis)
        self._mongo = mongo
        self.types = types

    async def admit(self, job: Job) -> None:
        """A job that has just become pending: send it, or look whether its user has a slot."""
        with _left_to_the_reconciler():
            if job["slot"] is not None:
                await self.send(job)
            elif job["runAt"] is None or job["runAt"] <= store.moment():
                await self.fill(job["userId"])

    async def fill(self, user: str) -> None:
        """Queue the user's next jobs, as many as there are free slots."""
        for _ in range(ROUNDS):
            free = await store.free_slots(self._mongo, user=user, slots=self.slots)
            if not free:
                return
            waiting = await self._waiting(user, most=len(free))
            if not waiting:
                return
            for job, slot in zip(waiting, free, strict=False):
                await self._place(job, slot)

    async def hand_on(self, user: str, slot: int | None) -> None:
        """A slot has become free: it goes to the user's next job."""
        if slot is None or slot >= self.slots:
            return
        with _left_to_the_reconciler():
            while waiting := await self._waiting(user, most=1):
                placed = await self._place(waiting[0], slot)
                if placed:
                    return
                if placed is None:  # somebody took it, who may not know of the others
                    await self.fill(user)
                    return

    async def send(self, job: Job) -> None:
        """A message for the next attempt."""
        lane = self.lanes[queue.class_of(job["priority"])]
        with _left_to_the_reconciler():
            await lane.enqueue(queue.message(job, self.types[job["type"]]))

    async def _waiting(self, user: str, *, most: int) -> list[Job]:
        """Of the types that are known here: others are for those who know them, in a deploy that rolls."""
        return await store.waiting(self._mongo, user=user, types=self.types, most=most, now=store.moment())

    async def _place(self, job: Job, slot: int) -> bool | None:
        taken = await store.take_slot(self._mongo, job=job, slot=slot, now=store.moment())
        if taken:
            await self.send(job)
        return taken


@contextmanager
def _left_to_the_reconciler() -> Iterator[None]:
    """The record stands: what cannot be done about it now is found and done later."""
    try:
        yield
    except (PyMongoError, RedisError, OSError) as error:
        log.warning("job not queued yet", error=str(error)[:200])
