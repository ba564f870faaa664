"""What others left behind: killed workers and servers, an emptied Redis. Safe in any number of workers at once.

Every repair is a conditional write on the record as it was read: of two that see the same, one succeeds.
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

UNHEARD = timedelta(seconds=5)  # a message sent so long ago is looked for
AT_ONCE = 500
MOST_ROUNDS = 20
DUE_SECONDS = 0.4
RECORDS_KEPT = timedelta(days=30)
LOGS_KEPT = timedelta(days=7)
ATTEMPTS_END = timedelta(hours=1)  # none takes so long
STEP_SECONDS = 60  # for each part of the housekeeping
_DUE_LOCK = "jobs:due"


async def reconcile(bench: Bench) -> None:
    """Back to work what has neither a lease nor a message."""
    await take_back_lost(bench)
    await send_missing(bench)
    await fill_slots(bench, scheduled_only=False)


async def take_back_lost(bench: Bench) -> None:
    """Attempts whose leases ran out: their workers were lost, unless it was MongoDB that was away."""
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
    """Queued attempts without a message."""
    for _ in range(MOST_ROUNDS):
        before = store.moment() - UNHEARD
        jobs = await store.long_sent(bench.stores.mongo, types=bench.types, before=before, most=AT_ONCE)
        lanes = defaultdict(list)
        for job in jobs:
            lanes[queue.class_of(job["priority"])].append(job)
        for name, each in lanes.items():
            await _send_missing(bench, name, each)
        if len(jobs) < AT_ONCE:
            return


async def _send_missing(bench: Bench, lane: str, jobs: list[Job]) -> None:
    keys = {queue.key_of(job): job for job in jobs}
    there = await bench.dispatcher.lanes[lane].waiting(list(keys))
    now = store.moment()
    mongo = bench.stores.mongo
    if there:
        waiting = [keys[key]["_id"] for key in there]
        await store.note_waiting(mongo, jobs=waiting, sent_before=now - UNHEARD, now=now)
    missing = [job for key, job in keys.items() if key not in there]
    for job in missing:
        if await store.send_again(mongo, job=job, now=now):
            await bench.dispatcher.send(job)
    if missing:
        log.warning("messages sent again", lane=lane, jobs=len(missing))


async def fill_slots(bench: Bench, *, scheduled_only: bool) -> None:
    """Queue jobs of users who have some waiting, and perhaps a free slot."""
    mongo, now = bench.stores.mongo, store.moment()
    for user in await store.users_waiting(mongo, types=bench.types, now=now, scheduled_only=scheduled_only):
        await bench.dispatcher.fill(user)


async def keep_admitting_due(bench: Bench, redis: Redis) -> None:
    """Queue what has waited for its time, for as long as the worker lives. Of all workers one looks at a time."""
    while True:
        try:
            if await redis.set(_DUE_LOCK, "", nx=True, px=int(DUE_SECONDS * 900)):
                await fill_slots(bench, scheduled_only=True)
        except (PyMongoError, RedisError, OSError) as error:
            log.warning("due jobs not looked for", error=str(error)[:200])
        await asyncio.sleep(DUE_SECONDS)


async def clean_up(bench: Bench) -> None:
    """Delete what nobody may expect to find any more. What takes too long is gone on with next time."""
    mongo, now = bench.stores.mongo, store.moment()
    for delete, before in (
        (artifacts.delete_expired, now),
        (artifacts.delete_abandoned, now - ATTEMPTS_END),
        (output.delete_old, now - LOGS_KEPT),
        (store.delete_old, now - RECORDS_KEPT),  # what they printed and made was younger, and is gone
    ):
        try:
            with pymongo.timeout(STEP_SECONDS):
                await delete(mongo, before=before)
        except PyMongoError as error:
            log.warning("not all cleaned up", error=str(error)[:200])
