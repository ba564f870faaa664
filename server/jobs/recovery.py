"""The reconciler: repairs what killed workers and servers or an emptied Redis leave behind.

Any number of workers may run it concurrently. Every repair is a conditional write on the record as it was read: of
two workers that see the same record, one succeeds.
"""

import asyncio
from collections import defaultdict
from datetime import timedelta

import pymongo
import structlog
from pymongo.errors import PyMongoError
from redis.asyncio import Redis
from redis.exceptions import RedisError

from server.jobs import artifacts, output, queue, store
from server.jobs.lifecycle import Bench
from server.jobs.store import Job

log = structlog.get_logger()

UNHEARD = timedelta(seconds=5)  # a message sent that long ago is checked
AT_ONCE = 500
MOST_ROUNDS = 20
DUE_SECONDS = 0.4
RECORDS_KEPT = timedelta(days=30)
LOGS_KEPT = timedelta(days=7)
ATTEMPTS_END = timedelta(hours=1)  # no attempt takes that long
STEP_SECONDS = 60  # for each step of the clean-up
_DUE_LOCK = "jobs:due"


async def reconcile(bench: Bench) -> None:
    """Reclaim jobs with an expired lease, redeliver lost messages, and fill free slots."""
    await take_back_lost(bench)
    await send_missing(bench)
    await fill_slots(bench, scheduled_only=False)


async def take_back_lost(bench: Bench) -> None:
    """Reclaim attempts with an expired lease: their workers are lost, unless MongoDB was unavailable."""
    if not bench.leases.can_judge():
        return
    mongo = bench.stores.mongo
    for job in await store.lost_leases(mongo, now=store.moment(), most=AT_ONCE):
        slot = job["slot"]
        if await store.take_back(mongo, job=job, now=store.moment()):
            log.warning("worker lost", job=job["_id"], worker=job["workerId"], in_a_row=job["lost"])
            await bench.announcements.moved(job)
            await bench.dispatcher.hand_on(job["userId"], slot)


async def send_missing(bench: Bench) -> None:
    """Redeliver the messages of queued attempts that have none."""
    for _ in range(MOST_ROUNDS):
        before = store.moment() - UNHEARD
        jobs = await store.long_sent(bench.stores.mongo, types=bench.types, before=before, most=AT_ONCE)
        by_class = defaultdict(list)
        for job in jobs:
            by_class[queue.class_of(job["priority"])].append(job)
        for priority_class, jobs_of_class in by_class.items():
            await _send_missing(bench, priority_class, jobs_of_class)
        if len(jobs) < AT_ONCE:
            return


async def _send_missing(bench: Bench, priority_class: str, jobs: list[Job]) -> None:
    by_key = {queue.key_of(job): job for job in jobs}
    queued = await bench.dispatcher.lanes[priority_class].waiting(list(by_key))
    now = store.moment()
    mongo = bench.stores.mongo
    if queued:
        waiting = [by_key[key]["_id"] for key in queued]
        await store.note_waiting(mongo, jobs=waiting, sent_before=now - UNHEARD, now=now)
    missing = [job for key, job in by_key.items() if key not in queued]
    for job in missing:
        if await store.send_again(mongo, job=job, now=now):
            await bench.dispatcher.send(job)
    if missing:
        log.warning("messages sent again", lane=priority_class, jobs=len(missing))


async def fill_slots(bench: Bench, *, scheduled_only: bool) -> None:
    """Enqueue waiting jobs of users who may have a free slot."""
    mongo, now = bench.stores.mongo, store.moment()
    for user in await store.users_waiting(mongo, types=bench.types, now=now, scheduled_only=scheduled_only):
        await bench.dispatcher.fill(user)


async def keep_admitting_due(bench: Bench, redis: Redis) -> None:
    """Enqueue scheduled jobs that are due, until cancelled; a lock lets one worker check at a time."""
    while True:
        try:
            if await redis.set(_DUE_LOCK, "", nx=True, px=int(DUE_SECONDS * 900)):
                await fill_slots(bench, scheduled_only=True)
        except (PyMongoError, RedisError, OSError) as error:
            log.warning("due jobs not looked for", error=str(error)[:200])
        await asyncio.sleep(DUE_SECONDS)


async def clean_up(bench: Bench) -> None:
    """Delete what exceeds its retention. A step that times out continues at the next run."""
    mongo, now = bench.stores.mongo, store.moment()
    for delete, before in (
        (artifacts.delete_expired, now),
        (artifacts.delete_abandoned, now - ATTEMPTS_END),
        (output.delete_old, now - LOGS_KEPT),
        (
            store.delete_old,
            now - RECORDS_KEPT,
        ),  # last: their logs and artifacts have a shorter retention and are deleted
    ):
        try:
            with pymongo.timeout(STEP_SECONDS):
                await delete(mongo, before=before)
        except PyMongoError as error:
            log.warning("not all cleaned up", error=str(error)[:200])
