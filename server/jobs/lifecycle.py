"""The lifecycle of an attempt: claim it, run it, write its outcome.

The functions of job types never write the record.
"""

import asyncio
import random
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar
from uuid import UUID

import structlog
from bson.errors import InvalidDocument
from opentelemetry.trace import SpanKind
from pymongo.errors import ConnectionFailure, DocumentTooLarge, PyMongoError

from server import fields, loop, metrics, tracing
from server.errors import ServiceError
from server.jobs import artifacts, output, store
from server.jobs.announcements import Announcements
from server.jobs.attempt_context import AttemptContext
from server.jobs.dispatch import Dispatcher
from server.jobs.leases import HeldLease, Leases
from server.jobs.output import OutputWriter
from server.jobs.sandbox import Sandbox
from server.jobs.store import JobRecord
from server.jobs.table import JobType
from server.jobs.workspace_files import WorkspaceFiles
from server.projects import access
from server.projects.access import ResourceKind, Role
from server.resources import Resources

log = structlog.get_logger()

MIN_BACKOFF_SECONDS, MAX_BACKOFF_SECONDS, BACKOFF_JITTER = 1.0, 60.0, 0.2
MONGO_RETRY_TIMEOUT_SECONDS = 60.0  # a restart of MongoDB should not make a finished program run again
MONGO_RETRY_INTERVAL_SECONDS = 0.3
T = TypeVar("T")


class InjectedFault(RuntimeError):
    """Raised on purpose, to show that retries work."""


@dataclass(frozen=True)
class WorkerContext:
    """The context of a worker process: the components that its attempts use."""

    stores: Resources
    dispatcher: Dispatcher
    announcements: Announcements
    leases: Leases
    sandbox: Sandbox
    files: WorkspaceFiles
    types: Mapping[str, JobType]
    worker: str


async def run_attempt(context: WorkerContext, *, job: str, claim: int) -> None:
    """Process one attempt from its message to its outcome.

    Never raises: errors are stored in the record only, since SAQ neither retries nor reports them.
    """
    structlog.contextvars.bind_contextvars(job=job)
    try:
        with context.leases.hold(job, claim) as held:
            record = await _claim_attempt(context, job=job, claim=claim)
            if record is None:
                return  # cancelled, or already claimed: the message arrived late or twice
            structlog.contextvars.bind_contextvars(type=record["type"], attempt=record["attempts"])
            slot = record["slot"]
            await _run_and_write(context, record, held)
        await context.dispatcher.release_slot(record["userId"], slot)
    except Exception:
        # If the outcome is not written, the lease expires and the reconciler reclaims the job.
        log.exception("attempt abandoned")


async def _claim_attempt(context: WorkerContext, *, job: str, claim: int) -> JobRecord | None:
    """Claim the attempt and return its record; None if the job is cancelled or another worker has claimed it."""
    mongo, worker = context.stores.mongo, context.worker
    record, _ = await _retry_mongo(
        lambda: store.claim(mongo, job=job, claim=claim, worker=worker, now=store.mongo_now())
    )
    if record is not None:
        _observe_wait(record)
        await context.announcements.announce_status(record)
    return record


def _observe_wait(record: JobRecord) -> None:
    """Observe the time from due to start; skip later attempts of a job without ``runAt``: their due time is unknown."""
    due = record["runAt"] or (record["createdAt"] if record["claim"] == 1 else None)
    if due is not None:
        seconds = (record["startedAt"] - due).total_seconds()
        metrics.JOB_WAIT.labels(record["type"]).observe(max(0.0, seconds))


async def _decide_outcome(
    context: WorkerContext,
    record: JobRecord,
    *,
    result: dict[str, Any] | None = None,
    error: dict[str, Any] | None = None,
    final: bool = True,
) -> None:
    """Complete or fail the job, or schedule a retry with backoff after a failure that is not final."""
    mongo, now = context.stores.mongo, store.mongo_now()
    if error is None:
        assert result is not None
        outcome, status = "completed", store.COMPLETED
        written = await _write_outcome(
            context, record, status, lambda: store.complete(mongo, job=record, result=result, now=now)
        )
    elif final or record["attempts"] >= record["maxAttempts"]:
        outcome, status = "failed", store.FAILED
        written = await _write_outcome(
            context, record, status, lambda: store.fail(mongo, job=record, error=error, now=now)
        )
    else:
        outcome, status = "retried", store.PENDING
        run_at = now + retry_backoff(record["attempts"])
        written = await _write_outcome(
            context,
            record,
            status,
            lambda: store.schedule_retry(mongo, job=record, error=error, run_at=run_at, now=now),
        )
    await _finish_attempt(context, record, outcome, written=written)


async def _requeue(context: WorkerContext, record: JobRecord) -> None:
    """Requeue the job because this worker shuts down; the attempt does not count."""
    # Clients and dashboards know this code and the outcome below.
    error = {"code": "handed_back", "message": "Worker shut down during the attempt"}
    mongo, now = context.stores.mongo, store.mongo_now()
    written = await _write_outcome(
        context, record, store.PENDING, lambda: store.requeue(mongo, job=record, error=error, now=now)
    )
    await _finish_attempt(context, record, "handed back", written=written)


def retry_backoff(attempts: int, *, random_value: float | None = None) -> timedelta:
    """Return the backoff with jitter after attempt n: 1 s · 2^(n−1), at most 60 s, ± 20 %."""
    random_value = random.random() if random_value is None else random_value  # noqa: S311 - jitter
    seconds = min(MAX_BACKOFF_SECONDS, MIN_BACKOFF_SECONDS * 2.0 ** (attempts - 1))
    return timedelta(seconds=seconds * (1 - BACKOFF_JITTER + 2 * BACKOFF_JITTER * random_value))


async def _run_and_write(context: WorkerContext, record: JobRecord, held: HeldLease) -> None:
    try:
        result = await held.run(_run_in_span(context, record))
    except asyncio.CancelledError:
        if held.stop_reason == "lost":
            await _finish_attempt(context, record, "superseded", written=False)
        else:
            await asyncio.shield(_requeue(context, record))
    except ServiceError as error:
        await _decide_outcome(
            context, record, error={"code": error.code, "message": error.detail}, final=error.status < 500
        )
    except Exception as error:
        log.warning("attempt failed", exc_info=not isinstance(error, InjectedFault), error=str(error))
        await _decide_outcome(context, record, error=_error_details(error), final=False)
    else:
        try:
            await _decide_outcome(context, record, result=result)
        except (DocumentTooLarge, InvalidDocument, OverflowError) as error:
            log.warning("result cannot be stored", error=str(error))
            await _decide_outcome(
                context,
                record,
                error={
                    "code": "result_too_large",
                    "message": "Result exceeds 16 MiB or contains values that cannot be stored",
                },
            )


async def _run_in_span(context: WorkerContext, record: JobRecord) -> dict[str, Any]:
    """Run the attempt in the trace of the request that created the job."""
    with tracing.span(
        f"attempt {record['type']}",
        SpanKind.CONSUMER,
        parent=record.get("trace"),  # absent in records of older versions
        job_id=record["_id"],
        job_type=record["type"],
        job_attempt=record["attempts"],
    ):
        return await _run(context, record)


async def _run(context: WorkerContext, record: JobRecord) -> dict[str, Any]:
    type = context.types[record["type"]]
    await _check_access(context, record)
    if random.random() < context.stores.settings.job_fault_rate:  # noqa: S311 - not a secret
        raise InjectedFault("injected fault")
    payload = fields.load(type.schema, record["payload"])
    async with _open_output(context, record) as writer, asyncio.timeout(type.timeout):
        attempt = AttemptContext(
            record,
            context.stores,
            context.sandbox,
            writer,
            context.files,
            lambda percent: _write_progress(context, record, percent),
        )
        return await type.run(attempt, payload)


async def _check_access(context: WorkerContext, record: JobRecord) -> None:
    """Check that the user still has the role in the project: it may have changed while the job waited.

    Raises:
        NotFound, Forbidden: the user has lost the role.
    """
    if record["projectId"]:
        user, project = UUID(record["userId"]), UUID(record["projectId"])
        await access.check(context.stores.db, user=user, kind=ResourceKind.PROJECT, id=project, role=Role.COLLABORATOR)


@asynccontextmanager
async def _open_output(context: WorkerContext, record: JobRecord) -> AsyncIterator[OutputWriter]:
    """Store the output while the block runs, and the rest afterwards, even if the block fails."""
    mongo, job, claim = context.stores.mongo, record["_id"], record["claim"]
    # Output of earlier attempts stays: a later attempt continues at its end.
    start = await output.read_end_offset(mongo, job=job) if claim > 1 else 0

    async def announce(chunks: Any) -> None:
        await context.announcements.announce_output(record, chunks)

    writer = OutputWriter(mongo, job=job, claim=claim, start=start, on_stored=announce, clock=store.mongo_now)
    flushing, timeout = asyncio.ensure_future(writer.flush_forever()), MONGO_RETRY_TIMEOUT_SECONDS
    try:
        yield writer
    except asyncio.CancelledError:
        timeout = 0  # the worker shuts down, or another attempt holds the job
        raise
    finally:
        try:
            await _retry_mongo(writer.flush, timeout=timeout)
        except PyMongoError as error:
            log.warning("output not stored", error=str(error)[:200])
        finally:
            await loop.cancel_tasks([flushing])


async def _write_progress(context: WorkerContext, record: JobRecord, percent: float) -> None:
    try:
        holds_claim = await store.set_progress(
            context.stores.mongo, job=record, progress=percent, now=store.mongo_now()
        )
    except PyMongoError as error:
        log.warning("progress not stored", error=str(error)[:200])
    else:
        if holds_claim:
            await context.announcements.announce_update(record)


async def _finish_attempt(context: WorkerContext, record: JobRecord, outcome: str, *, written: bool) -> None:
    metrics.JOBS_FINISHED.labels(record["type"], outcome if written else "superseded").inc()
    duration = (store.mongo_now() - record["startedAt"]).total_seconds()
    metrics.JOB_DURATION.labels(record["type"]).observe(max(0.0, duration))
    log.info("attempt ended", outcome=outcome, written=written)
    if written:
        await context.announcements.announce_status(record)
    if record["status"] != store.COMPLETED:
        await _delete_artifacts(context, record)


async def _delete_artifacts(context: WorkerContext, record: JobRecord) -> None:
    try:
        await artifacts.delete_for_attempt(context.stores.mongo, job=record["_id"], claim=record["claim"])
    except PyMongoError as error:  # the clean-up deletes them later
        log.warning("artifacts not deleted", error=str(error)[:200])


async def _write_outcome(
    context: WorkerContext, record: JobRecord, status: str, transition: Callable[[], Awaitable[bool]]
) -> bool:
    """Write the outcome; return whether it is written, even if MongoDB's response to the write was lost."""
    written, repeated = await _retry_mongo(transition)
    if written or not repeated:
        return written
    current = await store.read(context.stores.mongo, job=record["_id"])
    if current is None or (current["claim"], current["status"]) != (record["claim"], status):
        return False
    record |= current
    return True


async def _retry_mongo(
    operation: Callable[[], Awaitable[T]], *, timeout: float = MONGO_RETRY_TIMEOUT_SECONDS
) -> tuple[T, bool]:
    """Retry an operation until MongoDB responds; return the result, and whether it took more than one try.

    Raises:
        PyMongoError: MongoDB was unavailable or too slow until the deadline, or rejects the operation.
    """
    deadline, repeated = time.monotonic() + timeout, False
    while True:
        try:
            return await operation(), repeated
        except PyMongoError as error:
            if not (isinstance(error, ConnectionFailure) or error.timeout) or time.monotonic() > deadline:
                raise
            log.warning("retrying MongoDB", error=str(error)[:200])
            repeated = True
            await asyncio.sleep(MONGO_RETRY_INTERVAL_SECONDS)


def _error_details(error: Exception) -> dict[str, Any]:
    code = "timeout" if isinstance(error, TimeoutError) else "fault" if isinstance(error, InjectedFault) else "error"
    return {"code": code, "message": str(error)[:500] or type(error).__name__}
