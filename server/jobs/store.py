"""Job records in MongoDB: the source of truth. Every move is one conditional write.

Keys are those of the JSON, so that a record is shown as it is stored, but for what ``shown`` leaves out.
"""

import hashlib
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID, uuid4

from pymongo import ASCENDING, DESCENDING
from pymongo.errors import DuplicateKeyError

from server import json
from server.errors import ValidationFailed

PENDING, PROCESSING, COMPLETED, FAILED, CANCELLED = "pending", "processing", "completed", "failed", "cancelled"
MAX_ATTEMPTS = 3
LEASE = timedelta(seconds=20)
_HIDDEN = ("claim", "lease", "bodyHash")


async def prepare(mongo: Any) -> None:
    """Create the indexes; safe to call at every start."""
    await mongo.jobs.create_index(
        [("userId", ASCENDING), ("idempotencyKey", ASCENDING)],
        name="idempotency",
        unique=True,
        partialFilterExpression={"idempotencyKey": {"$type": "string"}},
    )
    await mongo.jobs.create_index([("userId", ASCENDING), ("createdAt", DESCENDING), ("_id", DESCENDING)], name="mine")
    await mongo.jobs.create_index([("status", ASCENDING), ("runAt", ASCENDING)], name="due")


async def create(
    mongo: Any,
    *,
    user: UUID,
    type: str,
    payload: dict[str, Any],
    priority: int,
    project: UUID | None,
    workspace: UUID | None,
    run_at: datetime | None,
    idempotency_key: str | None,
    now: datetime,
) -> tuple[dict[str, Any], bool]:
    """The job, and whether it was there already under the same key.

    Raises:
        ValidationFailed: ``idempotency_key_reused``: that key came with another body.
    """
    asked = [type, payload, priority, project, workspace, run_at]
    job: dict[str, Any] = {
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
        "bodyHash": hashlib.sha256(json.dumps(asked)).hexdigest(),
    }
    try:
        await mongo.jobs.insert_one(job)
    except DuplicateKeyError:
        earlier = await mongo.jobs.find_one({"userId": str(user), "idempotencyKey": idempotency_key})
        if earlier["bodyHash"] != job["bodyHash"]:
            raise ValidationFailed("That key came with another body", code="idempotency_key_reused") from None
        return earlier, True
    return job, False


async def read(mongo: Any, *, job: str) -> dict[str, Any] | None:
    found: dict[str, Any] | None = await mongo.jobs.find_one({"_id": job})
    return found


async def claim(mongo: Any, *, job: str, claim: int, worker: str, now: datetime) -> dict[str, Any] | None:
    """Take attempt number ``claim``; the record, or None where it is taken or no longer wanted."""
    taken = await mongo.jobs.update_one(
        {"_id": job, "status": PENDING, "claim": claim - 1},
        {
            "$set": {
                "status": PROCESSING,
                "claim": claim,
                "lease": now + LEASE,
                "workerId": worker,
                "startedAt": now,
                "updatedAt": now,
                "runAt": None,
            },
            "$inc": {"attempts": 1},
        },
    )
    return await read(mongo, job=job) if taken.matched_count else None


async def renew(mongo: Any, *, job: str, claim: int, now: datetime) -> bool:
    """Whether the claim still holds; its lease runs on."""
    renewed = await mongo.jobs.update_one(_held(job, claim), {"$set": {"lease": now + LEASE}})
    return bool(renewed.matched_count)


async def complete(mongo: Any, *, job: dict[str, Any], result: dict[str, Any], now: datetime) -> bool:
    """Store the result; whether the claim still held."""
    change = {"status": COMPLETED, "result": result, "error": None, "progress": 100, "completedAt": now}
    return await _end_attempt(mongo, job, change, error=None, now=now)


async def fail(mongo: Any, *, job: dict[str, Any], error: dict[str, Any], now: datetime) -> bool:
    """Fail for good; whether the claim still held."""
    change = {"status": FAILED, "error": error, "completedAt": now}
    return await _end_attempt(mongo, job, change, error=error, now=now)


async def postpone(mongo: Any, *, job: dict[str, Any], error: dict[str, Any], run_at: datetime, now: datetime) -> bool:
    """Back to pending, to be tried again at ``run_at``; whether the claim still held."""
    change = {"status": PENDING, "error": error, "runAt": run_at}
    return await _end_attempt(mongo, job, change, error=error, now=now)


async def hand_back(mongo: Any, *, job: dict[str, Any], error: dict[str, Any], now: datetime) -> bool:
    """Back to pending at once, without counting the attempt; whether the claim still held."""
    change = {"status": PENDING, "attempts": job["attempts"] - 1}
    return await _end_attempt(mongo, job, change, error=error, now=now)


async def _end_attempt(
    mongo: Any, job: dict[str, Any], change: dict[str, Any], *, error: dict[str, Any] | None, now: datetime
) -> bool:
    attempt = {
        "attempt": job["attempts"],
        "startedAt": job["startedAt"],
        "finishedAt": now,
        "workerId": job["workerId"],
        "error": error,
    }
    ended = await mongo.jobs.update_one(
        _held(job["_id"], job["claim"]),
        {"$set": {**change, "lease": None, "updatedAt": now}, "$push": {"history": attempt}},
    )
    return bool(ended.matched_count)


def _held(job: str, claim: int) -> dict[str, Any]:
    return {"_id": job, "status": PROCESSING, "claim": claim}


def shown(job: dict[str, Any]) -> dict[str, Any]:
    """The record as clients see it."""
    public = {key: value for key, value in job.items() if key not in _HIDDEN and key not in ("_id", "workerId")}
    return {"id": job["_id"], **public}


def moment() -> datetime:
    """Now, in the precision that MongoDB keeps."""
    now = datetime.now(UTC)
    return now.replace(microsecond=now.microsecond // 1000 * 1000)
