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
from server.jobs.attempt import Attempt
from server.jobs.dispatch import Dispatcher
from server.jobs.files import Files
from server.jobs.leases import Held, Leases
from server.jobs.output import Output
from server.jobs.sandbox import Sandbox
from server.jobs.store import Job
from server.jobs.table import JobType
from server.projects import access
from server.projects.access import Kind, Role
from server.resources import Resources

log = structlog.get_logger()

FIRST_PAUSE_SECONDS, LONGEST_PAUSE_SECONDS, JITTER = 1.0, 60.0, 0.2
PATIENCE_SECONDS = 60.0  # a restart of MongoDB should not make a finished program run again
AGAIN_SECONDS = 0.3
T = TypeVar("T")


class InjectedFault(RuntimeError):
    """Raised on purpose, to show that retries work."""


@dataclass(frozen=True)
class Bench:
    """The context of a worker process: the components that its attempts use."""

    stores: Resources
    dispatcher: Dispatcher
    announcements: Announcements
    leases: Leases
    sandbox: Sandbox
    files: Files
    types: Mapping[str, JobType]
    worker: str


async def attempt(bench: Bench, *, job: str, claim: int) -> None:
    """Process one attempt from its message to its outcome.

    Never raises: errors are stored in the record only, since SAQ neither retries nor reports them.
    """
    structlog.contextvars.bind_contextvars(job=job)
    try:
        with bench.leases.hold(job, claim) as held:
            record = await before_process(bench, job=job, claim=claim)
            if record is None:
                return  # cancelled, or already claimed: the message arrived late or twice
            structlog.contextvars.bind_contextvars(type=record["type"], attempt=record["attempts"])
            slot = record["slot"]
            await _run_and_write(bench, record, held)
        await bench.dispatcher.hand_on(record["userId"], slot)
    except Exception:
        # If the outcome is not written, the lease expires and the reconciler reclaims the job.
        log.exception("attempt left behind")


async def before_process(bench: Bench, *, job: str, claim: int) -> Job | None:
    """Claim the attempt and return its record, or None if there is nothing to do."""
    mongo, worker = bench.stores.mongo, bench.worker
    record, _ = await _patiently(lambda: store.claim(mongo, job=job, claim=claim, worker=worker, now=store.moment()))
    if record is not None:
        _measure_wait(record)
        await bench.announcements.moved(record)
    return record


def _measure_wait(record: Job) -> None:
    """Observe the time between due and started; an attempt without a known due time is not measured."""
    due = record["runAt"] or (record["createdAt"] if record["claim"] == 1 else None)
    if due is not None:
        seconds = (record["startedAt"] - due).total_seconds()
        metrics.JOB_WAIT.labels(record["type"]).observe(max(0.0, seconds))


async def after_process(
    bench: Bench,
    record: Job,
    *,
    result: dict[str, Any] | None = None,
    error: dict[str, Any] | None = None,
    final: bool = True,
) -> None:
    """Write the outcome; schedule a retry with backoff after a failure that is not final."""
    mongo, now = bench.stores.mongo, store.moment()
    if error is None:
        assert result is not None
        outcome, status = "completed", store.COMPLETED
        written = await _write(bench, record, status, lambda: store.complete(mongo, job=record, result=result, now=now))
    elif final or record["attempts"] >= record["maxAttempts"]:
        outcome, status = "failed", store.FAILED
        written = await _write(bench, record, status, lambda: store.fail(mongo, job=record, error=error, now=now))
    else:
        outcome, status = "retried", store.PENDING
        at = now + pause_after(record["attempts"])
        written = await _write(
            bench, record, status, lambda: store.postpone(mongo, job=record, error=error, run_at=at, now=now)
        )
    await _tell_end(bench, record, outcome, written=written)


async def hand_back(bench: Bench, record: Job) -> None:
    """Requeue the job because this worker shuts down; the attempt does not count."""
    error = {"code": "handed_back", "message": "Worker shut down during the attempt"}
    mongo, now = bench.stores.mongo, store.moment()
    written = await _write(
        bench, record, store.PENDING, lambda: store.hand_back(mongo, job=record, error=error, now=now)
    )
    await _tell_end(bench, record, "handed back", written=written)


def pause_after(attempts: int, *, chance: float | None = None) -> timedelta:
    """Return the backoff with jitter after attempt n: 1 s · 2^(n−1), at most 60 s, ± 20 %."""
    chance = random.random() if chance is None else chance  # noqa: S311 - jitter
    seconds = min(LONGEST_PAUSE_SECONDS, FIRST_PAUSE_SECONDS * 2.0 ** (attempts - 1))
    return timedelta(seconds=seconds * (1 - JITTER + 2 * JITTER * chance))


async def _run_and_write(bench: Bench, record: Job, held: Held) -> None:
    try:
        result = await held.run(_run_in_span(bench, record))
    except asyncio.CancelledError:
        if held.why == "lost":
            await _tell_end(bench, record, "superseded", written=False)
        else:
            await asyncio.shield(hand_back(bench, record))
    except ServiceError as refusal:
        await after_process(
            bench, record, error={"code": refusal.code, "message": refusal.detail}, final=refusal.status < 500
        )
    except Exception as error:
        log.warning("attempt failed", exc_info=not isinstance(error, InjectedFault), error=str(error))
        await after_process(bench, record, error=_described(error), final=False)
    else:
        try:
            await after_process(bench, record, result=result)
        except (DocumentTooLarge, InvalidDocument, OverflowError) as error:
            log.warning("result cannot be stored", error=str(error))
            await after_process(
                bench,
                record,
                error={
                    "code": "result_too_large",
                    "message": "Result exceeds 16 MiB or contains values that cannot be stored",
                },
            )


async def _run_in_span(bench: Bench, record: Job) -> dict[str, Any]:
    """Run the attempt in the trace of the request that created the job."""
    with tracing.span(
        f"attempt {record['type']}",
        SpanKind.CONSUMER,
        parent=record.get("trace"),  # absent in records of older versions
        job_id=record["_id"],
        job_type=record["type"],
        job_attempt=record["attempts"],
    ):
        return await _run(bench, record)


async def _run(bench: Bench, record: Job) -> dict[str, Any]:
    type = bench.types[record["type"]]
    await _check_access(bench, record)
    if random.random() < bench.stores.settings.job_fault_rate:  # noqa: S311 - not a secret
        raise InjectedFault("injected fault")
    payload = fields.load(type.schema, record["payload"])
    async with _output(bench, record) as writer, asyncio.timeout(type.timeout):
        attempt = Attempt(
            record, bench.stores, bench.sandbox, writer, bench.files, lambda percent: _progress(bench, record, percent)
        )
        return await type.run(attempt, payload)


async def _check_access(bench: Bench, record: Job) -> None:
    """Check that the user still has the role in the project: it may have changed while the job waited.

    Raises:
        NotFound, Forbidden: the user has lost the role.
    """
    if record["projectId"]:
        user, project = UUID(record["userId"]), UUID(record["projectId"])
        await access.check(bench.stores.db, user=user, kind=Kind.PROJECT, id=project, role=Role.COLLABORATOR)


@asynccontextmanager
async def _output(bench: Bench, record: Job) -> AsyncIterator[Output]:
    """Store the output while the block runs, and the rest afterwards, even if the block fails."""
    mongo, job, claim = bench.stores.mongo, record["_id"], record["claim"]
    # Only a first attempt knows that no output is stored.
    start = await output.end_of(mongo, job=job) if claim > 1 else 0

    async def announce(chunks: Any) -> None:
        await bench.announcements.output(record, chunks)

    writer = Output(mongo, job=job, claim=claim, start=start, tell=announce, now=store.moment)
    flushing, timeout = asyncio.ensure_future(writer.keep()), PATIENCE_SECONDS
    try:
        yield writer
    except asyncio.CancelledError:
        timeout = 0  # the worker shuts down, or another attempt holds the job
        raise
    finally:
        try:
            await _patiently(writer.flush, seconds=timeout)
        except PyMongoError as error:
            log.warning("output not kept", error=str(error)[:200])
        finally:
            await loop.end([flushing])


async def _progress(bench: Bench, record: Job, percent: float) -> None:
    try:
        holds_claim = await store.set_progress(bench.stores.mongo, job=record, progress=percent, now=store.moment())
    except PyMongoError as error:
        log.warning("progress not kept", error=str(error)[:200])
    else:
        if holds_claim:
            await bench.announcements.changed(record)


async def _tell_end(bench: Bench, record: Job, outcome: str, *, written: bool) -> None:
    metrics.JOBS_FINISHED.labels(record["type"], outcome if written else "superseded").inc()
    duration = (store.moment() - record["startedAt"]).total_seconds()
    metrics.JOB_DURATION.labels(record["type"]).observe(max(0.0, duration))
    log.info("attempt ended", outcome=outcome, written=written)
    if written:
        await bench.announcements.moved(record)
    if record["status"] != store.COMPLETED:
        await _discard(bench, record)


async def _discard(bench: Bench, record: Job) -> None:
    try:
        await artifacts.discard(bench.stores.mongo, job=record["_id"], claim=record["claim"])
    except PyMongoError as error:  # the clean-up deletes them later
        log.warning("artifacts not discarded yet", error=str(error)[:200])


async def _write(bench: Bench, record: Job, status: str, transition: Callable[[], Awaitable[bool]]) -> bool:
    """Write the outcome; return whether it is written, even if MongoDB's response to the write was lost."""
    written, repeated = await _patiently(transition)
    if written or not repeated:
        return written
    current = await store.read(bench.stores.mongo, job=record["_id"])
    if current is None or (current["claim"], current["status"]) != (record["claim"], status):
        return False
    record |= current
    return True


async def _patiently(operation: Callable[[], Awaitable[T]], *, seconds: float = PATIENCE_SECONDS) -> tuple[T, bool]:
    """Retry an operation until MongoDB responds; return the result, and whether it took more than one try.

    Raises:
        PyMongoError: MongoDB was unavailable or too slow until the deadline, or rejects the operation.
    """
    deadline, repeated = time.monotonic() + seconds, False
    while True:
        try:
            return await operation(), repeated
        except PyMongoError as error:
            if not (isinstance(error, ConnectionFailure) or error.timeout) or time.monotonic() > deadline:
                raise
            log.warning("waiting for MongoDB", error=str(error)[:200])
            repeated = True
            await asyncio.sleep(AGAIN_SECONDS)


def _described(error: Exception) -> dict[str, Any]:
    code = "timeout" if isinstance(error, TimeoutError) else "fault" if isinstance(error, InjectedFault) else "error"
    return {"code": code, "message": str(error)[:500] or type(error).__name__}
