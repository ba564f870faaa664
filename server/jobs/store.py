"""Job records in MongoDB: the source of truth. Every move is one conditional write.

Keys are those of the JSON, so that a record is shown as it is stored, but for what ``shown`` leaves out:

claim   grows with every attempt and with every message that is sent anew; only who holds it may write (the fence)
lease   until when the holder of a running attempt is believed to live
slot    one of its user's few, held while an attempt is queued or runs: unique, so that no two processes can give
        out one slot twice
sentAt  when the message of a queued attempt was sent
lost    workers lost in a row
trace   the traceparent of the request that asked for it
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
MOST_LOST = 5  # workers in a row
LEASE = timedelta(seconds=10)
HISTORY_LENGTH = 50
LAST_WORDS = timedelta(seconds=3)  # a cancelled job's processes are gone after 2
PAGE_BYTES = 4 << 20  # a page of jobs with large results ends early
_HIDDEN = ("_id", "claim", "lease", "slot", "sentAt", "lost", "bodyHash", "workerId", "userName", "trace")

Job = dict[str, Any]


async def prepare(mongo: Any) -> None:
    """Create the indexes; safe to call at every start. One that an older version made otherwise is made anew."""
    for name, keys, options in _INDEXES:
        try:
            await mongo.jobs.create_index(keys, name=name, **options)
        except OperationFailure as error:
            if error.code not in _OTHERWISE:
                raise
            await mongo.jobs.drop_index(name)
            await mongo.jobs.create_index(keys, name=name, **options)


_OTHERWISE = (85, 86)  # IndexOptionsConflict, IndexKeySpecsConflict


# Filters of partial indexes are comparisons: MongoDB does not see that a value fits {"$type": "string"}, and would
# not use them.
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
    trace: str | None,
    now: datetime,
) -> tuple[Job, bool]:
    """The job, and whether it was there already under the same key.

    One that is due takes one of its user's slots by guess; where that is taken it has none, and waits.

    Raises:
        ValidationFailed: ``idempotency_key_reused``: that key came with another body.
    """
    is_due = run_at is None or run_at <= now
    job: Job = {
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
        "trace": trace,
        "bodyHash": body_hash,
    }
    while True:
        try:
            await mongo.jobs.insert_one(job)
        except DuplicateKeyError:
            # Either index may have refused: the key's is asked, and the slot goes.
            if earlier := await under_key(mongo, user=user, key=idempotency_key, body_hash=body_hash):
                return earlier, True
            if job["slot"] is None:
                raise
            job |= {"slot": None, "sentAt": None}
        else:
            return job, False


async def under_key(mongo: Any, *, user: UUID, key: str | None, body_hash: str) -> Job | None:
    """The job that the user asked for under this key.

    Raises:
        ValidationFailed: ``idempotency_key_reused``: that key came with another body.
    """
    if key is None:
        return None
    earlier: Job | None = await mongo.jobs.find_one({"userId": str(user), "idempotencyKey": key})
    if earlier and earlier["bodyHash"] != body_hash:
        raise ValidationFailed("That key came with another body", code="idempotency_key_reused")
    return earlier


def hash_of(body: dict[str, Any]) -> str:
    """Of what was asked for, in whatever order and under whatever key."""
    asked = {name: value for name, value in body.items() if name != "idempotency_key"}
    return hashlib.sha256(json.canonical(asked)).hexdigest()


async def read(mongo: Any, *, job: str) -> Job | None:
    found: Job | None = await mongo.jobs.find_one({"_id": job})
    return found


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
) -> tuple[list[Job], bool]:
    """Return the jobs of a workspace, else of a project, else of the user, newest first, and whether there are more.

    At least one, then as many as fit.
    """
    place = {"workspaceId": str(workspace)} if workspace else {"projectId": str(project)} if project else None
    wanted: dict[str, Any] = place or {"userId": str(user)}
    wanted |= {key: value for key, value in (("status", status), ("type", type)) if value}
    created, id = after
    if created is not None:
        wanted["$or"] = [{"createdAt": {"$lt": created}}, {"createdAt": created, "_id": {"$lt": id}}]
    newest = [("createdAt", DESCENDING), ("_id", DESCENDING)]
    found: list[Job] = []
    size = 0
    async for job in mongo.jobs.find(wanted, sort=newest, limit=limit + 1, batch_size=10):
        size += len(json.dumps(job))
        if len(found) == limit or (found and size > PAGE_BYTES):
            return found, True
        found.append(job)
    return found, False


async def count(mongo: Any, *, user: UUID, now: datetime) -> tuple[dict[str, int], dict[str, int]]:
    """How many of the user's jobs have which status; how many of everybody's wait, run and are scheduled."""
    mine = dict.fromkeys(STATUSES, 0)
    grouped = [{"$match": {"userId": str(user)}}, {"$group": {"_id": "$status", "jobs": {"$sum": 1}}}]
    async for each in mongo.jobs.aggregate(grouped):
        mine[each["_id"]] = each["jobs"]
    queued = await mongo.jobs.count_documents({"status": PENDING, "runAt": {"$not": {"$gt": now}}})
    scheduled = await mongo.jobs.count_documents({"status": PENDING, "runAt": {"$gt": now}})
    active = await mongo.jobs.count_documents({"status": PROCESSING})
    return mine, {"queued": queued, "active": active, "scheduled": scheduled}


SCHEDULED, LIMITED = "scheduled", "limited"
UNFINISHED_STATES = (PENDING, LIMITED, SCHEDULED, PROCESSING)


@dataclass(frozen=True)
class Unfinished:
    """Jobs of one type in one state.

    ``pending``: due, and a worker may take it; ``limited``: due, while its user has as many attempts queued or
    running as one user may have; ``scheduled``: not due yet; ``processing``.
    """

    type: str
    state: str
    number: int
    oldest_seconds: float


async def unfinished(mongo: Any, *, now: datetime) -> list[Unfinished]:
    """Return all users' jobs that are not finished, and since when the oldest of each kind has been due."""
    waits = {"$cond": [{"$eq": [{"$ifNull": ["$slot", None]}, None]}, LIMITED, PENDING]}
    pending = {"$cond": [{"$gt": ["$runAt", now]}, SCHEDULED, waits]}
    state = {"$cond": [{"$eq": ["$status", PENDING]}, pending, PROCESSING]}
    grouped = [
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
        Unfinished(
            each["_id"]["type"], each["_id"]["state"], each["number"], max(0.0, (now - each["oldest"]).total_seconds())
        )
        async for each in mongo.jobs.aggregate(grouped)
    ]


# Slots -----------------------------------------------------------------------------------------------------------


async def free_slots(mongo: Any, *, user: str, slots: int) -> list[int]:
    held = {each["slot"] async for each in mongo.jobs.find({"userId": user, "slot": {"$gte": 0}}, {"slot": 1})}
    return [slot for slot in range(slots) if slot not in held]


async def waiting(mongo: Any, *, user: str, types: Collection[str], most: int, now: datetime) -> list[Job]:
    """The user's due jobs of these types without a slot: by priority, then age."""
    wanted = {"userId": user, "status": PENDING, "slot": None, "type": {"$in": list(types)}}
    due = wanted | {"runAt": {"$not": {"$gt": now}}}
    order = [("priority", DESCENDING), ("createdAt", ASCENDING)]
    found: list[Job] = await mongo.jobs.find(due, sort=order, limit=most).to_list(None)
    return found


async def users_waiting(mongo: Any, *, types: Collection[str], now: datetime, scheduled_only: bool) -> list[str]:
    """Who has due jobs of these types without a slot; on request only those that waited for their time."""
    due = {"$lte": now} if scheduled_only else {"$not": {"$gt": now}}
    wanted = {"status": PENDING, "slot": None, "type": {"$in": list(types)}, "runAt": due}
    users: list[str] = await mongo.jobs.distinct("userId", wanted)
    return users


async def take_slot(mongo: Any, *, job: Job, slot: int, now: datetime) -> bool | None:
    """Whether the job got the slot; None where the slot was taken."""
    change = {"slot": slot, "sentAt": now}
    try:
        taken = await mongo.jobs.update_one(
            {"_id": job["_id"], "status": PENDING, "claim": job["claim"], "slot": None}, {"$set": change}
        )
    except DuplicateKeyError:
        return None
    job |= change
    return bool(taken.matched_count)


async def long_sent(mongo: Any, *, types: Collection[str], before: datetime, most: int) -> list[Job]:
    """Queued attempts of these types whose messages were sent before that."""
    wanted = {"sentAt": {"$lt": before}, "type": {"$in": list(types)}}
    found: list[Job] = await mongo.jobs.find(wanted, limit=most).to_list(None)
    return found


async def send_again(mongo: Any, *, job: Job, now: datetime) -> bool:
    """A new claim for a new message: the old one, should it still come, finds nothing to do."""
    change = {"claim": job["claim"] + 1, "sentAt": now}
    changed = await mongo.jobs.update_one(
        {"_id": job["_id"], "status": PENDING, "claim": job["claim"], "sentAt": job["sentAt"]}, {"$set": change}
    )
    job |= change
    return bool(changed.matched_count)


async def note_waiting(mongo: Any, *, jobs: Collection[str], sent_before: datetime, now: datetime) -> None:
    """Their messages do wait: not to be looked at again soon."""
    await mongo.jobs.update_many(
        {"_id": {"$in": list(jobs)}, "status": PENDING, "sentAt": {"$lt": sent_before}}, {"$set": {"sentAt": now}}
    )


# Attempts --------------------------------------------------------------------------------------------------------


async def claim(mongo: Any, *, job: str, claim: int, worker: str, now: datetime) -> Job | None:
    """Take attempt number ``claim``; the record, or None where it is taken or no longer wanted.

    May be repeated by the same worker where the answer was lost.
    """
    await mongo.jobs.update_one(
        {"_id": job, "status": PENDING, "claim": claim - 1},
        {
            "$set": {
                "status": PROCESSING,
                "claim": claim,
                "lease": now + LEASE,
                "workerId": worker,
                "startedAt": now,
                "updatedAt": now,
                "sentAt": None,
                "progress": 0,
            },
            "$inc": {"attempts": 1},
        },
    )
    found: Job | None = await mongo.jobs.find_one({**_held(job, claim), "workerId": worker})
    return found


async def renew(mongo: Any, *, jobs: Collection[str], worker: str, now: datetime) -> None:
    """The leases of these attempts, where they are still this worker's, run on."""
    await mongo.jobs.update_many(
        {"_id": {"$in": list(jobs)}, "status": PROCESSING, "workerId": worker}, {"$set": {"lease": now + LEASE}}
    )


async def claims(mongo: Any, *, jobs: Collection[str], worker: str) -> dict[str, int]:
    """The claims that this worker holds on these jobs."""
    held = mongo.jobs.find({"_id": {"$in": list(jobs)}, "status": PROCESSING, "workerId": worker}, {"claim": 1})
    return {each["_id"]: each["claim"] async for each in held}


async def set_progress(mongo: Any, *, job: Job, progress: float, now: datetime) -> bool:
    """Whether the claim still held."""
    change = {"progress": progress, "updatedAt": now}
    changed = await mongo.jobs.update_one(_held(job["_id"], job["claim"]), {"$set": change})
    job |= change
    return bool(changed.matched_count)


async def complete(mongo: Any, *, job: Job, result: dict[str, Any], now: datetime) -> bool:
    """Store the result; whether the claim still held."""
    change = {"status": COMPLETED, "result": result, "error": None, "progress": 100, "completedAt": now}
    return await _end_attempt(mongo, job, change, error=None, now=now)


async def fail(mongo: Any, *, job: Job, error: dict[str, Any], now: datetime) -> bool:
    """Fail for good; whether the claim still held."""
    change = {"status": FAILED, "error": error, "completedAt": now}
    return await _end_attempt(mongo, job, change, error=error, now=now)


async def postpone(mongo: Any, *, job: Job, error: dict[str, Any], run_at: datetime, now: datetime) -> bool:
    """Back to pending, to be tried again at ``run_at``; whether the claim still held."""
    change = {"status": PENDING, "error": error, "runAt": run_at, "lost": 0}
    return await _end_attempt(mongo, job, change, error=error, now=now)


async def hand_back(mongo: Any, *, job: Job, error: dict[str, Any], now: datetime) -> bool:
    """Back to pending at once, without counting the attempt; whether the claim still held."""
    change = {"status": PENDING, "attempts": job["attempts"] - 1, "lost": 0}
    return await _end_attempt(mongo, job, change, error=error, now=now)


async def lost_leases(mongo: Any, *, now: datetime, most: int) -> list[Job]:
    found: list[Job] = await mongo.jobs.find({"lease": {"$lt": now}}, limit=most).to_list(None)
    return found


async def take_back(mongo: Any, *, job: Job, now: datetime) -> bool:
    """The worker was lost: back to pending without counting the attempt, or failed after too many in a row.

    Whether it was still so.
    """
    lost = job["lost"] + 1
    error = {"code": "worker_lost", "message": "the worker that ran it was lost"}
    change = {"attempts": job["attempts"] - 1, "lost": lost}
    if lost >= MOST_LOST:
        change |= {"status": FAILED, "error": error, "completedAt": now}
    else:
        change |= {"status": PENDING}
    return await _end_attempt(mongo, job, change, error=error, now=now, where={"lease": job["lease"]})


async def cancel(mongo: Any, *, job: Job, now: datetime) -> bool:
    """Cancel a job that is as it was read; whether it still was."""
    error = {"code": "cancelled", "message": "it was cancelled"}
    change = {"status": CANCELLED, "completedAt": now}
    if job["status"] == PROCESSING:
        return await _end_attempt(mongo, job, change, error=error, now=now)
    as_read = {"status": PENDING, "claim": job["claim"], "slot": job["slot"]}  # a slot that it got since is handed on
    return await _change(mongo, job, as_read, {**change, **_RELEASED}, now)


async def start_anew(mongo: Any, *, job: Job, now: datetime) -> bool:
    """A failed or cancelled job waits again, its attempts counted anew; whether it was as it was read."""
    change = {
        "status": PENDING,
        "attempts": 0,
        "lost": 0,
        "progress": 0,
        "error": None,
        "result": None,
        "runAt": None,
        "startedAt": None,
        "completedAt": None,
    }
    return await _change(mongo, job, {"status": job["status"], "claim": job["claim"]}, change, now)


async def delete_old(mongo: Any, *, before: datetime) -> None:
    """Jobs that ended before that."""
    await mongo.jobs.delete_many({"completedAt": {"$lt": before}})


_RELEASED = {"slot": None, "sentAt": None, "lease": None}


async def _end_attempt(
    mongo: Any,
    job: Job,
    change: dict[str, Any],
    *,
    error: dict[str, Any] | None,
    now: datetime,
    where: dict[str, Any] | None = None,
) -> bool:
    attempt = {
        "attempt": job["attempts"],
        "startedAt": job["startedAt"],
        "finishedAt": now,
        "workerId": job["workerId"],
        "error": error,
    }
    return await _change(
        mongo, job, _held(job["_id"], job["claim"]) | (where or {}), {**change, **_RELEASED}, now, attempt=attempt
    )


async def _change(
    mongo: Any,
    job: Job,
    condition: dict[str, Any],
    change: dict[str, Any],
    now: datetime,
    *,
    attempt: dict[str, Any] | None = None,
) -> bool:
    """One move, if the condition holds; ``job`` follows."""
    update: dict[str, Any] = {"$set": {**change, "updatedAt": now}}
    if attempt is not None:
        update["$push"] = {"history": {"$each": [attempt], "$slice": -HISTORY_LENGTH}}
    changed = await mongo.jobs.update_one({"_id": job["_id"], **condition}, update)
    if not changed.matched_count:
        return False
    job |= {**change, "updatedAt": now}
    if attempt is not None:
        job["history"] = [*job["history"], attempt][-HISTORY_LENGTH:]
    return True


def _held(job: str, claim: int) -> dict[str, Any]:
    return {"_id": job, "status": PROCESSING, "claim": claim}


def has_settled(job: Job, *, now: datetime) -> bool:
    """It has ended, and nothing more will come of it: a cancelled program may still say its last words."""
    if job["status"] == CANCELLED and job["startedAt"] is not None:
        return bool(now - job["completedAt"] > LAST_WORDS)
    return job["status"] not in (PENDING, PROCESSING)


def shown(job: Job) -> Job:
    """The record as clients see it."""
    return {"id": job["_id"], **{key: value for key, value in job.items() if key not in _HIDDEN}}


def moment() -> datetime:
    """Now, in the precision that MongoDB keeps."""
    now = datetime.now(UTC)
    return now.replace(microsecond=now.microsecond // 1000 * 1000)
