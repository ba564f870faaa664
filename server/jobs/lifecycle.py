"""The life of one attempt: claim it, run it, write what came of it. Functions of types never write the record."""

import asyncio
import random
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import structlog
from saq.queue.redis import RedisQueue

from server import fields, metrics
from server.errors import ServiceError
from server.jobs import queue, store
from server.jobs.sandbox import Sandbox
from server.jobs.table import Attempt, JobType
from server.resources import Resources

log = structlog.get_logger()

RENEW_SECONDS = 5.0
FIRST_PAUSE_SECONDS, LONGEST_PAUSE_SECONDS, JITTER = 1.0, 60.0, 0.2


class InjectedFault(RuntimeError):
    """Raised on purpose, to show that retries work."""


@dataclass(frozen=True)
class Bench:
    """What a worker process works with."""

    stores: Resources
    queue: RedisQueue
    sandbox: Sandbox
    types: Mapping[str, JobType]
    worker: str


async def attempt(bench: Bench, *, job: str, claim: int) -> None:
    """One attempt from its message to its outcome."""
    record = await before_process(bench, job=job, claim=claim)
    if record is None:
        return  # cancelled, or claimed already: the message came late or twice
    structlog.contextvars.bind_contextvars(job=job, type=record["type"], attempt=record["attempts"])
    try:
        result = await _run(bench, record)
    except asyncio.CancelledError:
        await asyncio.shield(_hand_back(bench, record))
        raise
    except ServiceError as refusal:
        await after_process(bench, record, error={"code": refusal.code, "message": refusal.detail}, final=True)
    except Exception as error:
        log.warning("attempt failed", exc_info=not isinstance(error, InjectedFault), error=str(error))
        await after_process(bench, record, error=_described(error), final=False)
    else:
        await after_process(bench, record, result=result)


async def before_process(bench: Bench, *, job: str, claim: int) -> dict[str, Any] | None:
    """The record with our claim on it, or None where there is nothing to do."""
    return await store.claim(bench.stores.mongo, job=job, claim=claim, worker=bench.worker, now=store.moment())


async def after_process(
    bench: Bench,
    record: dict[str, Any],
    *,
    result: dict[str, Any] | None = None,
    error: dict[str, Any] | None = None,
    final: bool = True,
) -> None:
    """Write the outcome; a failure that is not final is tried again after a pause."""
    mongo, now = bench.stores.mongo, store.moment()
    if error is None:
        assert result is not None
        outcome, written = "completed", await store.complete(mongo, job=record, result=result, now=now)
    elif final or record["attempts"] >= record["maxAttempts"]:
        outcome, written = "failed", await store.fail(mongo, job=record, error=error, now=now)
    else:
        run_at = now + pause_after(record["attempts"])
        outcome = "retried"
        written = await store.postpone(mongo, job=record, error=error, run_at=run_at, now=now)
        if written:
            await queue.send(bench.queue, job=record, type=bench.types[record["type"]], at=run_at)
    metrics.JOBS_FINISHED.labels(record["type"], outcome if written else "superseded").inc()
    log.info("attempt ended", outcome=outcome, written=written)


def pause_after(attempts: int, *, chance: float | None = None) -> timedelta:
    """1 s · 2^(n−1) after attempt n, at most 60 s, ± 20 %."""
    chance = random.random() if chance is None else chance  # noqa: S311 - jitter
    seconds = min(LONGEST_PAUSE_SECONDS, FIRST_PAUSE_SECONDS * 2.0 ** (attempts - 1))
    return timedelta(seconds=seconds * (1 - JITTER + 2 * JITTER * chance))


async def _run(bench: Bench, record: dict[str, Any]) -> dict[str, Any]:
    type = bench.types[record["type"]]
    if random.random() < bench.stores.settings.job_fault_rate:  # noqa: S311 - not a secret
        raise InjectedFault("injected fault")
    payload = fields.load(type.schema, record["payload"])
    work = asyncio.ensure_future(
        type.run(Attempt(record["_id"], record["claim"], bench.stores, bench.sandbox), payload)
    )
    lease = asyncio.ensure_future(_keep_lease(bench, record))
    try:
        async with asyncio.timeout(type.timeout):
            await asyncio.wait({work, lease}, return_when=asyncio.FIRST_COMPLETED)
        if not work.done():
            raise ServiceError("The job was cancelled or taken over")
        return work.result()
    finally:
        for task in (work, lease):
            task.cancel()
        await asyncio.gather(work, lease, return_exceptions=True)


async def _keep_lease(bench: Bench, record: dict[str, Any]) -> None:
    """Returns when the claim is lost."""
    while True:
        await asyncio.sleep(RENEW_SECONDS)
        held = await store.renew(bench.stores.mongo, job=record["_id"], claim=record["claim"], now=store.moment())
        if not held:
            return


async def _hand_back(bench: Bench, record: dict[str, Any]) -> None:
    error = {"code": "handed_back", "message": "the worker stopped"}
    if await store.hand_back(bench.stores.mongo, job=record, error=error, now=store.moment()):
        await queue.send(bench.queue, job=record, type=bench.types[record["type"]])


def _described(error: Exception) -> dict[str, Any]:
    code = "timeout" if isinstance(error, TimeoutError) else "fault" if isinstance(error, InjectedFault) else "error"
    return {"code": code, "message": str(error)[:500] or type(error).__name__}
