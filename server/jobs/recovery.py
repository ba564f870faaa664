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
from server.jobs.lifecycle import WorkerContext
from server.jobs.store import JobRecord

log = structlog.get_logger()

MIN_MESSAGE_AGE = timedelta(seconds=5)  # a message that was sent that long ago is checked
BATCH_SIZE = 500
MAX_ROUNDS = 20
DUE_CHECK_INTERVAL_SECONDS = 0.4
RECORD_RETENTION = timedelta(days=30)
LOG_RETENTION = timedelta(days=7)
MAX_ATTEMPT_DURATION = timedelta(hours=1)  # no attempt takes that long
CLEAN_UP_STEP_TIMEOUT_SECONDS = 60  # for each step of the clean-up
_DUE_LOCK = "jobs:due"


async def reconcile(context: WorkerContext) -> None:
    """Reclaim jobs with an expired lease, redeliver lost messages, and fill free slots."""
    await reclaim_expired(context)
    await redeliver_missing(context)
    await admit_waiting_jobs(context, scheduled_only=False)


async def reclaim_expired(context: WorkerContext) -> None:
    """Reclaim attempts with an expired lease: their workers are lost, unless MongoDB was unavailable."""
    if not context.leases.can_reclaim():
        return
    mongo = context.stores.mongo
    for job in await store.list_expired_leases(mongo, now=store.mongo_now(), limit=BATCH_SIZE):
        slot = job["slot"]
        if await store.reclaim(mongo, job=job, now=store.mongo_now()):
            log.warning(
                "lease expired, job reclaimed", job=job["_id"], worker=job["workerId"], lost_workers=job["lost"]
            )
            await context.announcements.announce_status(job)
            await context.dispatcher.release_slot(job["userId"], slot)


async def redeliver_missing(context: WorkerContext) -> None:
    """Redeliver the messages of queued attempts that have none."""
    for _ in range(MAX_ROUNDS):
        before = store.mongo_now() - MIN_MESSAGE_AGE
        jobs = await store.stale_messages(context.stores.mongo, types=context.types, before=before, limit=BATCH_SIZE)
        by_class = defaultdict(list)
        for job in jobs:
            by_class[queue.priority_class(job["priority"])].append(job)
        for priority_class, jobs_of_class in by_class.items():
            await _redeliver_missing_of_class(context, priority_class, jobs_of_class)
        if len(jobs) < BATCH_SIZE:
            return


async def _redeliver_missing_of_class(context: WorkerContext, priority_class: str, jobs: list[JobRecord]) -> None:
    by_key = {queue.message_key(job): job for job in jobs}
    queued = await context.dispatcher.queues[priority_class].queued_keys(list(by_key))
    now = store.mongo_now()
    mongo = context.stores.mongo
    if queued:
        waiting = [by_key[key]["_id"] for key in queued]
        await store.confirm_messages(mongo, jobs=waiting, sent_before=now - MIN_MESSAGE_AGE, now=now)
    missing = [job for key, job in by_key.items() if key not in queued]
    for job in missing:
        if await store.renew_message(mongo, job=job, now=now):
            await context.dispatcher.enqueue(job)
    if missing:
        log.warning("messages redelivered", queue=priority_class, jobs=len(missing))


async def admit_waiting_jobs(context: WorkerContext, *, scheduled_only: bool) -> None:
    """Enqueue waiting jobs of users who may have a free slot."""
    mongo, now = context.stores.mongo, store.mongo_now()
    for user in await store.list_waiting_users(mongo, types=context.types, now=now, scheduled_only=scheduled_only):
        await context.dispatcher.fill_slots(user)


async def admit_due_jobs_forever(context: WorkerContext, redis: Redis) -> None:
    """Enqueue scheduled jobs that are due, until cancelled; a lock lets one worker check at a time."""
    while True:
        try:
            if await redis.set(_DUE_LOCK, "", nx=True, px=int(DUE_CHECK_INTERVAL_SECONDS * 900)):
                await admit_waiting_jobs(context, scheduled_only=True)
        except (PyMongoError, RedisError, OSError) as error:
            log.warning("due jobs not admitted", error=str(error)[:200])
        await asyncio.sleep(DUE_CHECK_INTERVAL_SECONDS)


async def clean_up(context: WorkerContext) -> None:
    """Delete what exceeds its retention. A step that times out continues at the next run."""
    mongo, now = context.stores.mongo, store.mongo_now()
    for delete, before in (
        (artifacts.delete_expired, now),
        (artifacts.delete_abandoned, now - MAX_ATTEMPT_DURATION),
        (output.delete_old, now - LOG_RETENTION),
        # Last: the logs and artifacts of these jobs have a shorter retention, and are deleted already.
        (store.delete_old, now - RECORD_RETENTION),
    ):
        try:
            with pymongo.timeout(CLEAN_UP_STEP_TIMEOUT_SECONDS):
                await delete(mongo, before=before)
        except PyMongoError as error:
            log.warning("clean-up step failed", error=str(error)[:200])
