"""Fair scheduling: selects a user's next job to enqueue.

A user has a fixed number of slots. A queued or running attempt holds one, in its job's record; the other jobs wait as
records. The end or cancellation of an attempt releases its slot and fills it with the next job. A request that creates
a job without a slot looks for a free slot afterwards. So of two concurrent processes at least one sees the other's
write, and the reconciler repairs the state that a killed process leaves.
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

ROUNDS = 3  # a process that loses that many races leaves the rest to the others


class Dispatcher:
    """The component that assigns slots to waiting jobs and enqueues them."""

    def __init__(self, mongo: Any, redis: Redis, *, types: Mapping[str, JobType], slots: int) -> None:
        self.slots = slots
        self.lanes = queue.lanes(redis)
        self._mongo = mongo
        self.types = types

    async def admit(self, job: Job) -> None:
        """Enqueue a job that has just become pending if it has a slot; else fill its user's free slots."""
        with _left_to_the_reconciler():
            if job["slot"] is not None:
                await self.send(job)
            elif job["runAt"] is None or job["runAt"] <= store.moment():
                await self.fill(job["userId"])

    async def fill(self, user: str) -> None:
        """Enqueue the user's next jobs, one per free slot."""
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
        """Assign a slot that has become free to the user's next job."""
        if slot is None or slot >= self.slots:
            return
        with _left_to_the_reconciler():
            while waiting := await self._waiting(user, most=1):
                placed = await self._place(waiting[0], slot)
                if placed:
                    return
                if placed is None:  # another process took it, and may not see the other waiting jobs
                    await self.fill(user)
                    return

    async def send(self, job: Job) -> None:
        """Send a message for the next attempt."""
        priority_queue = self.lanes[queue.class_of(job["priority"])]
        with _left_to_the_reconciler():
            await priority_queue.enqueue(queue.message(job, self.types[job["type"]]))

    async def _waiting(self, user: str, *, most: int) -> list[Job]:
        """Return waiting jobs of known types: in a rolling deploy, processes of the other version enqueue the rest."""
        return await store.waiting(self._mongo, user=user, types=self.types, most=most, now=store.moment())

    async def _place(self, job: Job, slot: int) -> bool | None:
        """Return whether the job got the slot, or None if the slot was taken."""
        taken = await store.take_slot(self._mongo, job=job, slot=slot, now=store.moment())
        if taken:
            await self.send(job)
        return taken


@contextmanager
def _left_to_the_reconciler() -> Iterator[None]:
    """Log an outage of a store: the record is stored, so that the reconciler enqueues the job later."""
    try:
        yield
    except (PyMongoError, RedisError, OSError) as error:
        log.warning("job not queued yet", error=str(error)[:200])
