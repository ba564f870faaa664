"""Job records in MongoDB: the source of truth. Every state transition is one conditional write.

The keys are those of the JSON, so that clients see a record as it is stored, except what ``client_view`` omits:

claim   grows with every attempt, redelivered message and retry by a user; only its holder may write (the fence)
lease   the time until which the worker of a running attempt counts as alive
slot    one of the user's few slots, held while an attempt is queued or runs: unique per user, so that no two processes
        can assign the same slot
sentAt  the time at which the message of a queued attempt was sent
lost    the number of consecutively lost workers
trace   the traceparent of the request that created the job
"""

import hashlib
import random
from collections.abc import Collection
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID, uuid4

from pymongo import ASCENDING, DESCENDING
from pymongo.errors import DuplicateKeyError, OperationFailure

from server import json
from server.errors import ValidationFailed

PENDING, PROCESSING, COMPLETED, FAILED, CANCELLED = "pending", "processing", "completed", "failed", "cancelled"
STATUSES = (PENDING, PROCESSING, COMPLETED, FAILED, CANCELLED)
MAX_ATTEMPTS = 3
MAX_LOST_WORKERS = 5  # consecutive ones; then the job fails, because it may be what kills them
LEASE_DURATION = timedelta(seconds=10)
MAX_HISTORY = 50
OUTPUT_GRACE_DURATION = timedelta(seconds=3)  # the processes of a cancelled job end within 2 s
MAX_PAGE_BYTES = 4 << 20  # a page of jobs with large results is shorter than its limit
_INTERNAL_FIELDS = ("_id", "claim", "lease", "slot", "sentAt", "lost", "bodyHash", "workerId", "userName", "trace")

JobRecord = dict[str, Any]


async def create_indexes(mongo: Any) -> None:
    """Create the indexes, idempotently; replace those that an older version defined differently."""
    for name, keys, options in _INDEXES:
        try:
            await mongo.jobs.create_index(keys, name=name, **options)
        except OperationFailure as error:
            if error.code not in _INDEX_CONFLICT_CODES:
                raise
            await mongo.jobs.drop_index(name)
            await mongo.jobs.create_index(keys, name=name, **options)


_INDEX_CONFLICT_CODES = (85, 86)  # IndexOptionsConflict, IndexKeySpecsConflict


# The filters of partial indexes are comparisons: MongoDB does not infer that a value matches {"$type": "string"}, and
# would not use the index.
_INDEXES: list[tuple[str, list[tuple[str, int]], dict[str, Any]]] = [
    (
        "keys",
        [("userId", ASCENDING), ("idempotencyKey", ASCENDING)],
        {"unique": True, "partialFilterExpression": {"idempotencyKey": {"$gt": ""}}},
    ),
    (
        "slots",
        [("userId", ASCENDING), ("slot", ASCENDING)],
        {"unique": True, "partialFilterExpression": {"slot": {"$gte": 0}}},
    ),
    (
        "waiting",
        [(key, ASCENDING) for key in ("userId", "status", "slot")]
        + [("priority", DESCENDING), ("createdAt", ASCENDING)],
        {},
    ),
    ("mine", [("userId", ASCENDING), ("createdAt", DESCENDING), ("_id", DESCENDING)], {}),
    (
        "of_project",
        [("projectId", ASCENDING), ("createdAt", DESCENDING), ("_id", DESCENDING)],
        {"partialFilterExpression": {"projectId": {"$gt": ""}}},
    ),
    (
        "of_workspace",
        [("workspaceId", ASCENDING), ("createdAt", DESCENDING), ("_id", DESCENDING)],
        {"partialFilterExpression": {"workspaceId": {"$gt": ""}}},
    ),
    ("due", [("status", ASCENDING), ("slot", ASCENDING), ("runAt", ASCENDING)], {}),
    ("by_lease", [("lease", ASCENDING)], {}),
    ("by_sent_at", [("sentAt", ASCENDING)], {}),
    ("by_completed_at", [("completedAt", ASCENDING)], {}),
]


async def create(
    mongo: Any,
    *,
    user: UUID,
    user_name: str,
    type: str,
    payload: dict[str, Any],
    priority: int,
    project: UUID | None,
    workspace: UUID | None,
    run_at: datetime | None,
    idempotency_key: str | None,
    body_hash: str,
    slots: int,
    traceparent: str | None,
    now: datetime,
) -> tuple[JobRecord, bool]:
    """Return the job, and whether it existed already under the same idempotency key.

    A job that is due tries one random slot of its user; if that slot is taken, the job has none and waits.

    Raises:
        ValidationFailed: ``idempotency_key_reused``: the key was used with another body.
    """
    is_due = run_at is None or run_at <= now
    job: JobRecord = {
        "_id": str(uuid4()),
        "type": type,
        "status": PENDING,
        "payload": payload,
        "result": None,
        "error": None,
        "progress": 0,
        "priority": priority,
        "attempts": 0,
        "maxAttempts": MAX_ATTEMPTS,
        "idempotencyKey": idempotency_key,
        "userId": str(user),
        "projectId": project and str(project),
        "workspaceId": workspace and str(workspace),
        "createdAt": now,
        "updatedAt": now,
        "runAt": run_at,
        "startedAt": None,
        "completedAt": None,
        "history": [],
        "claim": 0,
        "lease": None,
        "slot": random.randrange(slots) if is_due else None,  # noqa: S311 - not a secret
        "sentAt": now if is_due else None,
        "lost": 0,
        "userName": user_name,
        "trace": traceparent,
        "bodyHash": body_hash,
    }
    while True:
        try:
            await mongo.jobs.insert_one(job)
        except DuplicateKeyError:
            # Either unique index may have rejected the job: look up the key, else give up the slot.
            if earlier := await find_by_idempotency_key(mongo, user=user, key=idempotency_key, body_hash=body_hash):
                return earlier, True
            if job["slot"] is None:
                raise
            job |= {"slot": None, "sentAt": None}
        else:
            return job, False


async def find_by_idempotency_key(mongo: Any, *, user: UUID, key: str | None, body_hash: str) -> JobRecord | None:
    """Return the job that the user created under this idempotency key.

    Raises:
        ValidationFailed: ``idempotency_key_reused``: the key was used with another body.
    """
    if key is None:
        return None
    earlier: JobRecord | None = await mongo.jobs.find_one({"userId": str(user), "idempotencyKey": key})
    if earlier and earlier["bodyHash"] != body_hash:
        raise ValidationFailed("Idempotency key was used with another request body", code="idempotency_key_reused")
    return earlier


def hash_body(body: dict[str, Any]) -> str:
    """Return the hash of a request body, independent of the order of its keys and of the idempotency key."""
    hashed = {name: value for name, value in body.items() if name != "idempotency_key"}
    return hashlib.sha256(json.canonical(hashed)).hexdigest()


async def read(mongo: Any, *, job: str) -> JobRecord | None:
    record: JobRecord | None = await mongo.jobs.find_one({"_id": job})
    return record


async def list_jobs(
    mongo: Any,
    *,
    user: UUID,
    project: UUID | None,
    workspace: UUID | None,
    status: str | None,
    type: str | None,
    limit: int,
    after: tuple[datetime | None, str | None] = (None, None),
) -> tuple[list[JobRecord], bool]:
    """Return the jobs of a workspace, else of a project, else of the user, newest first, and whether there are more.

    A page has at least one job, then as many as fit into its maximum size.
    """
    scope = {"workspaceId": str(workspace)} if workspace else {"projectId": str(project)} if project else None
    query: dict[str, Any] = scope or {"userId": str(user)}
    query |= {key: value for key, value in (("status", status), ("type", type)) if value}
    created, id = after
    if created is not None:
        query["$or"] = [{"createdAt": {"$lt": created}}, {"createdAt": created, "_id": {"$lt": id}}]
    newest = [("createdAt", DESCENDING), ("_id", DESCENDING)]
    page: list[JobRecord] = []
    size = 0
    async for job in mongo.jobs.find(query, sort=newest, limit=limit + 1, batch_size=10):
        size += len(json.dumps(job))
        if len(page) == limit or (page and size > MAX_PAGE_BYTES):
            return page, True
        page.append(job)
    return page, False


async def count_by_status(mongo: Any, *, user: UUID, now: datetime) -> tuple[dict[str, int], dict[str, int]]:
    """Count the user's jobs by status, and all users' jobs that are queued, active and scheduled."""
    by_status = dict.fromkeys(STATUSES, 0)
    pipeline = [{"$match": {"userId": str(user)}}, {"$group": {"_id": "$status", "jobs": {"$sum": 1}}}]
    async for group in mongo.jobs.aggregate(pipeline):
        by_status[group["_id"]] = group["jobs"]
    queued = await mongo.jobs.count_documents({"status": PENDING, "runAt": {"$not": {"$gt": now}}})
    scheduled = await mongo.jobs.count_documents({"status": PENDING, "runAt": {"$gt": now}})
    active = await mongo.jobs.count_documents({"status": PROCESSING})
    return by_status, {"queued": queued, "active": active, "scheduled": scheduled}


SCHEDULED, LIMITED = "scheduled", "limited"
UNFINISHED_STATES = (PENDING, LIMITED, SCHEDULED, PROCESSING)


@dataclass(frozen=True)
class UnfinishedJobs:
    """Jobs of one type in one state.

    ``pending``: due, and a worker may take it; ``limited``: due, but all slots of its user are taken;
    ``scheduled``: not due yet; ``processing``: a worker runs it.
    """

    type: str
    state: str
    count: int
    oldest_seconds: float


async def count_unfinished(mongo: Any, *, now: datetime) -> list[UnfinishedJobs]:
    """Count all users' unfinished jobs by type and state, with the seconds since the oldest became due."""
    due = {"$cond": [{"$eq": [{"$ifNull": ["$slot", None]}, None]}, LIMITED, PENDING]}
    pending = {"$cond": [{"$gt": ["$runAt", now]}, SCHEDULED, due]}
    state = {"$cond": [{"$eq": ["$status", PENDING]}, pending, PROCESSING]}
    pipeline = [
        {"$match": {"status": {"$in": [PENDING, PROCESSING]}}},
        {
            "$group": {
                "_id": {"type": "$type", "state": state},
                "number": {"$sum": 1},
                "oldest": {"$min": {"$ifNull": ["$runAt", "$createdAt"]}},
            }
        },
    ]
    return [
        UnfinishedJobs(
            group["_id"]["type"],
            group["_id"]["state"],
            group["number"],
            max(0.0, (now - group["oldest"]).total_seconds()),
        )
        async for group in mongo.jobs.aggregate(pipeline)
    ]


# Slots -----------------------------------------------------------------------------------------------------------


async def free_slots(mongo: Any, *, user: str, slots: int) -> list[int]:
    held = {job["slot"] async for job in mongo.jobs.find({"userId": user, "slot": {"$gte": 0}}, {"slot": 1})}
    return [slot for slot in range(slots) if slot not in held]


async def list_waiting(mongo: Any, *, user: str, types: Collection[str], limit: int, now: datetime) -> list[JobRecord]:
    """Return the user's due jobs of these types without a slot, by priority, then age."""
    waiting_jobs = {"userId": user, "status": PENDING, "slot": None, "type": {"$in": list(types)}}
    due = waiting_jobs | {"runAt": {"$not": {"$gt": now}}}
    order = [("priority", DESCENDING), ("createdAt", ASCENDING)]
    jobs: list[JobRecord] = await mongo.jobs.find(due, sort=order, limit=limit).to_list(None)
    return jobs


async def list_waiting_users(mongo: Any, *, types: Collection[str], now: datetime, scheduled_only: bool) -> list[str]:
    """Return the users with due jobs of these types without a slot; optionally count only scheduled jobs."""
    due = {"$lte": now} if scheduled_only else {"$not": {"$gt": now}}
    query = {"status": PENDING, "slot": None, "type": {"$in": list(types)}, "runAt": due}
    users: list[str] = await mongo.jobs.distinct("userId", query)
    return users


async def take_slot(mongo: Any, *, job: JobRecord, slot: int, now: datetime) -> bool | None:
    """Assign a slot to a job; return whether the job was still waiting, or None if the slot was taken."""
    change = {"slot": slot, "sentAt": now}
    try:
        taken = await mongo.jobs.update_one(
            {"_id": job["_id"], "status": PENDING, "claim": job["claim"], "slot": None}, {"$set": change}
        )
    except DuplicateKeyError:
        return None
    job |= change
    return bool(taken.matched_count)


async def stale_messages(mongo: Any, *, types: Collection[str], before: datetime, limit: int) -> list[JobRecord]:
    """Return queued attempts of these types whose messages were sent before a time."""
    query = {"sentAt": {"$lt": before}, "type": {"$in": list(types)}}
    jobs: list[JobRecord] = await mongo.jobs.find(query, limit=limit).to_list(None)
    return jobs


async def renew_message(mongo: Any, *, job: JobRecord, now: datetime) -> bool:
    """Raise the claim for a new message, so that the old message has no effect if it still arrives."""
    change = {"claim": job["claim"] + 1, "sentAt": now}
    changed = await mongo.jobs.update_one(
        {"_id": job["_id"], "status": PENDING, "claim": job["claim"], "sentAt": job["sentAt"]}, {"$set": change}
    )
    job |= change
    return bool(changed.matched_count)


async def confirm_messages(mongo: Any, *, jobs: Collection[str], sent_before: datetime, now: datetime) -> None:
    """Mark messages that are still in their queue as sent now, so that the reconciler checks them later."""
    await mongo.jobs.update_many(
        {"_id": {"$in": list(jobs)}, "status": PENDING, "sentAt": {"$lt": sent_before}}, {"$set": {"sentAt": now}}
    )


# Attempts --------------------------------------------------------------------------------------------------------


async def claim(mongo: Any, *, job: str, claim: int, worker: str, now: datetime) -> JobRecord | None:
    """Claim attempt number ``claim``; return the record, or None if it is taken or the job is cancelled.

    Idempotent for the same worker, which may repeat the call after a lost response.
    """
    await mongo.jobs.update_one(
        {"_id": job, "status": PENDING, "claim": claim - 1},
        {
            "$set": {
                "status": PROCESSING,
                "claim": claim,
                "lease": now + LEASE_DURATION,
                "workerId": worker,
                "startedAt": now,
                "updatedAt": now,
                "sentAt": None,
                "progress": 0,
            },
            "$inc": {"attempts": 1},
        },
    )
    record: JobRecord | None = await mongo.jobs.find_one({**_claim_filter(job, claim), "workerId": worker})
    return record


async def renew_leases(mongo: Any, *, jobs: Collection[str], worker: str, now: datetime) -> None:
    """Renew the leases of those attempts that this worker still holds."""
    await mongo.jobs.update_many(
        {"_id": {"$in": list(jobs)}, "status": PROCESSING, "workerId": worker},
        {"$set": {"lease": now + LEASE_DURATION}},
    )


async def read_held_claims(mongo: Any, *, jobs: Collection[str], worker: str) -> dict[str, int]:
    """Return the claims that this worker holds on these jobs, by job."""
    held = mongo.jobs.find({"_id": {"$in": list(jobs)}, "status": PROCESSING, "workerId": worker}, {"claim": 1})
    return {job["_id"]: job["claim"] async for job in held}


async def set_progress(mongo: Any, *, job: JobRecord, progress: float, now: datetime) -> bool:
    """Store the progress; return whether the claim still held."""
    change = {"progress": progress, "updatedAt": now}
    changed = await mongo.jobs.update_one(_claim_filter(job["_id"], job["claim"]), {"$set": change})
    job |= change
    return bool(changed.matched_count)


async def complete(mongo: Any, *, job: JobRecord, result: dict[str, Any], now: datetime) -> bool:
    """Complete the job with its result; return whether the claim still held."""
    change = {"status": COMPLETED, "result": result, "error": None, "progress": 100, "completedAt": now}
    return await _end_attempt(mongo, job, change, error=None, now=now)


async def fail(mongo: Any, *, job: JobRecord, error: dict[str, Any], now: datetime) -> bool:
    """Fail the job for good (a dead letter: only ``retry`` revives it); return whether the claim still held."""
    change = {"status": FAILED, "error": error, "completedAt": now}
    return await _end_attempt(mongo, job, change, error=error, now=now)


async def schedule_retry(mongo: Any, *, job: JobRecord, error: dict[str, Any], run_at: datetime, now: datetime) -> bool:
    """Schedule a retry at ``run_at``; return whether the claim still held."""
    change = {"status": PENDING, "error": error, "runAt": run_at, "lost": 0}
    return await _end_attempt(mongo, job, change, error=error, now=now)


async def requeue(mongo: Any, *, job: JobRecord, error: dict[str, Any], now: datetime) -> bool:
    """Make the job pending again without counting the attempt; return whether the claim still held."""
    change = {"status": PENDING, "attempts": job["attempts"] - 1, "lost": 0}
    return await _end_attempt(mongo, job, change, error=error, now=now)


async def list_expired_leases(mongo: Any, *, now: datetime, limit: int) -> list[JobRecord]:
    jobs: list[JobRecord] = await mongo.jobs.find({"lease": {"$lt": now}}, limit=limit).to_list(None)
    return jobs


async def reclaim(mongo: Any, *, job: JobRecord, now: datetime) -> bool:
    """Reclaim a job whose worker is lost; return whether the lease was still the expired one.

    The job becomes pending without counting the attempt, or fails after too many consecutive losses.
    """
    lost = job["lost"] + 1
    error = {"code": "worker_lost", "message": "Worker was lost during the attempt"}
    change = {"attempts": job["attempts"] - 1, "lost": lost}
    if lost >= MAX_LOST_WORKERS:
        change |= {"status": FAILED, "error": error, "completedAt": now}
    else:
        change |= {"status": PENDING}
    return await _end_attempt(mongo, job, change, error=error, now=now, condition={"lease": job["lease"]})


async def cancel(mongo: Any, *, job: JobRecord, now: datetime) -> bool:
    """Cancel a job; return whether it was still as read."""
    error = {"code": "cancelled", "message": "Job was cancelled"}
    change = {"status": CANCELLED, "completedAt": now}
    if job["status"] == PROCESSING:
        return await _end_attempt(mongo, job, change, error=error, now=now)
    # If the job got a slot since, this write fails, and the caller reads the job again to release that slot.
    as_read = {"status": PENDING, "claim": job["claim"], "slot": job["slot"]}
    return await _update_if(mongo, job, as_read, {**change, **_RELEASE_FIELDS}, now)


async def retry(mongo: Any, *, job: JobRecord, now: datetime) -> bool:
    """Make a failed or cancelled job pending with its attempts reset; return whether it was still as read.

    The claim is raised: a message from before the cancellation would start the job without a slot.
    """
    change = {
        "status": PENDING,
        "claim": job["claim"] + 1,
        "attempts": 0,
        "lost": 0,
        "progress": 0,
        "error": None,
        "result": None,
        "runAt": None,
        "startedAt": None,
        "completedAt": None,
    }
    return await _update_if(mongo, job, {"status": job["status"], "claim": job["claim"]}, change, now)


async def delete_old(mongo: Any, *, before: datetime) -> None:
    """Delete the jobs that ended before a time."""
    await mongo.jobs.delete_many({"completedAt": {"$lt": before}})


_RELEASE_FIELDS = {"slot": None, "sentAt": None, "lease": None}


async def _end_attempt(
    mongo: Any,
    job: JobRecord,
    change: dict[str, Any],
    *,
    error: dict[str, Any] | None,
    now: datetime,
    condition: dict[str, Any] | None = None,
) -> bool:
    attempt = {
        "attempt": job["attempts"],
        "startedAt": job["startedAt"],
        "finishedAt": now,
        "workerId": job["workerId"],
        "error": error,
    }
    return await _update_if(
        mongo,
        job,
        _claim_filter(job["_id"], job["claim"]) | (condition or {}),
        {**change, **_RELEASE_FIELDS},
        now,
        attempt=attempt,
    )


async def _update_if(
    mongo: Any,
    job: JobRecord,
    condition: dict[str, Any],
    change: dict[str, Any],
    now: datetime,
    *,
    attempt: dict[str, Any] | None = None,
) -> bool:
    """Write a state transition if the condition holds, and apply it to ``job``; return whether it did."""
    update: dict[str, Any] = {"$set": {**change, "updatedAt": now}}
    if attempt is not None:
        update["$push"] = {"history": {"$each": [attempt], "$slice": -MAX_HISTORY}}
    changed = await mongo.jobs.update_one({"_id": job["_id"], **condition}, update)
    if not changed.matched_count:
        return False
    job |= {**change, "updatedAt": now}
    if attempt is not None:
        job["history"] = [*job["history"], attempt][-MAX_HISTORY:]
    return True


def _claim_filter(job: str, claim: int) -> dict[str, Any]:
    return {"_id": job, "status": PROCESSING, "claim": claim}


def is_output_complete(job: JobRecord, *, now: datetime) -> bool:
    """Return whether a job has ended and its output is complete: a cancelled program may still print for a moment."""
    if job["status"] == CANCELLED and job["startedAt"] is not None:
        return bool(now - job["completedAt"] > OUTPUT_GRACE_DURATION)
    return job["status"] not in (PENDING, PROCESSING)


def client_view(job: JobRecord) -> JobRecord:
    """Return the record as clients see it."""
    return {"id": job["_id"], **{key: value for key, value in job.items() if key not in _INTERNAL_FIELDS}}


def mongo_now() -> datetime:
    """Return the current time in the precision of MongoDB (milliseconds)."""
    now = datetime.now(UTC)
    return now.replace(microsecond=now.microsecond // 1000 * 1000)
