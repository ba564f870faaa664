"""Fair scheduling: selects a user's next job to enqueue.

A user has a fixed number of slots. A queued or running attempt holds one, in its job's record; the other jobs wait as
records. The end or cancellation of an attempt releases its slot and fills it with the next job. A request that creates
a job without a slot looks for a free slot after the insert, in case one was released meanwhile: of the two concurrent
processes, at least one sees the other's write. The reconciler repairs the state that a killed process leaves.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import structlog
from pymongo.errors import PyMongoError
from redis.asyncio import Redis
from redis.exceptions import RedisError

from server.jobs import queue, store
from server.jobs.store import JobRecord
from server.jobs.table import JobType

log = structlog.get_logger()

MAX_FILL_ROUNDS = 3  # after that many lost races, the winners fill the remaining slots


class Dispatcher:
    """The component that assigns slots to waiting jobs and enqueues them."""

    def __init__(self, mongo: Any, redis: Redis, *, types: Mapping[str, JobType], slots: int) -> None:
        self.slots = slots
        self.queues = queue.priority_queues(redis)
        self._mongo = mongo
        self.types = types

    async def admit(self, job: JobRecord) -> None:
        """Enqueue a job that has just become pending if it has a slot; else fill its user's free slots."""
        with _defer_to_reconciler():
            if job["slot"] is not None:
                await self.enqueue(job)
            elif job["runAt"] is None or job["runAt"] <= store.mongo_now():
                await self.fill_slots(job["userId"])

    async def fill_slots(self, user: str) -> None:
        """Enqueue the user's next jobs, one per free slot."""
        for _ in range(MAX_FILL_ROUNDS):
            free = await store.free_slots(self._mongo, user=user, slots=self.slots)
            if not free:
                return
            waiting = await self._waiting(user, limit=len(free))
            if not waiting:
                return
            for job, slot in zip(waiting, free, strict=False):
                await self._assign_slot(job, slot)

    async def release_slot(self, user: str, slot: int | None) -> None:
        """Assign a slot that has become free to the user's next job."""
        if slot is None or slot >= self.slots:
            return
        with _defer_to_reconciler():
            while waiting := await self._waiting(user, limit=1):
                assigned = await self._assign_slot(waiting[0], slot)
                if assigned:
                    return
                if assigned is None:  # another process took it, and may not see the other waiting jobs
                    await self.fill_slots(user)
                    return

    async def enqueue(self, job: JobRecord) -> None:
        """Send a message for the next attempt."""
        priority_queue = self.queues[queue.priority_class(job["priority"])]
        with _defer_to_reconciler():
            await priority_queue.enqueue(queue.make_message(job, self.types[job["type"]]))

    async def _waiting(self, user: str, *, limit: int) -> list[JobRecord]:
        """Return waiting jobs of known types: in a rolling deploy, processes of the other version enqueue the rest."""
        return await store.list_waiting(self._mongo, user=user, types=self.types, limit=limit, now=store.mongo_now())

    async def _assign_slot(self, job: JobRecord, slot: int) -> bool | None:
        """Return whether the job got the slot, or None if the slot was taken."""
        taken = await store.take_slot(self._mongo, job=job, slot=slot, now=store.mongo_now())
        if taken:
            await self.enqueue(job)
        return taken


@contextmanager
def _defer_to_reconciler() -> Iterator[None]:
    """Log an outage of a store: the record is stored, so that the reconciler enqueues the job later."""
    try:
        yield
    except (PyMongoError, RedisError, OSError) as error:
        log.warning("job not enqueued, left to the reconciler", error=str(error)[:200])
