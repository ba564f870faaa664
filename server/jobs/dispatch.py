"""Fair shares: which of a user's jobs is queued next.

At most so many attempts of one user are queued or running, each in a slot of its record; the others wait as
records. Whoever frees a slot fills it: the end of an attempt, a cancel. Whoever adds a job that got no slot looks
for one afterwards. So one of the two sees the other, and what a killed process left is found by the reconciler.
"""

from collections.abc import Mapping
from typing import Any

import structlog
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
        self._types = types

    async def admit(self, job: Job) -> None:
        """A job that has just become pending: send it, or look whether its user has a slot."""
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
            waiting = await store.waiting(self._mongo, user=user, most=len(free), now=store.moment())
            if not waiting:
                return
            for job, slot in zip(waiting, free, strict=False):
                await self._place(job, slot)

    async def hand_on(self, user: str, slot: int | None) -> None:
        """A slot has become free: it goes to the user's next job."""
        if slot is None or slot >= self.slots:
            return
        while waiting := await store.waiting(self._mongo, user=user, most=1, now=store.moment()):
            placed = await self._place(waiting[0], slot)
            if placed:
                return
            if placed is None:  # somebody took it, who may not know of the others
                await self.fill(user)
                return

    async def send(self, job: Job) -> None:
        """A message for the next attempt; when Redis is away the reconciler sends it later."""
        lane = self.lanes[queue.class_of(job["priority"])]
        try:
            await lane.enqueue(queue.message(job, self._types[job["type"]]))
        except (RedisError, OSError) as error:
            log.warning("job not sent", job=job["_id"], error=str(error))

    async def _place(self, job: Job, slot: int) -> bool | None:
        taken = await store.take_slot(self._mongo, job=job, slot=slot, now=store.moment())
        if taken:
            await self.send(job)
        return taken
