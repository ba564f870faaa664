"""Clean-up: data beyond their retention are deleted; young data and waiting jobs are kept."""

import asyncio
import dataclasses
from collections.abc import AsyncIterator
from datetime import timedelta
from types import SimpleNamespace
from typing import Any, cast
from uuid import uuid4

import pytest
import saq

from server.jobs import artifacts, indexes, output, recovery, store
from server.jobs.lifecycle import WorkerContext
from server.jobs.queue import MaintenanceQueue
from server.resources import Resources, connect
from server.settings import Settings
from server.worker import MaintenanceWorker, _end_tasks
from tests.jobs.conftest import MakeContext
from tests.timeouts import WAIT_TIMEOUT_SECONDS


@pytest.fixture
async def stores(settings: Settings, isolated_stores: dict[str, str]) -> AsyncIterator[Resources]:
    async with connect(dataclasses.replace(settings, **isolated_stores)) as opened:
        await indexes.create_all(opened.mongo)
        yield opened


async def job_of(mongo: Any, *, age: timedelta, status: str = "completed") -> dict[str, Any]:
    """Create a job that ended this long ago, with output and an artifact."""
    now = store.mongo_now()
    job: dict[str, Any] = {"_id": str(uuid4()), "claim": 1, "status": status, "completedAt": now - age}
    if status == "pending":
        job["completedAt"] = None
    await mongo.jobs.insert_one(job)
    chunk = {"_id": f"{job['_id']}:0000000000", "job": job["_id"], "offset": 0, "stream": "stdout", "text": "x"}
    await mongo.logs.insert_one({**chunk, "time": now - age})
    async with artifacts.upload(mongo, job=job, name="a", content_type="text/plain", now=now - age) as upload:
        await upload.write(b"x" * 300_000)
    return job


async def left(mongo: Any, job: dict[str, Any]) -> tuple[bool, bool, bool]:
    """Return whether record, output and artifact exist."""
    record = await store.read(mongo, job=job["_id"])
    text, _ = await output.read(mongo, job=job["_id"], after=0, limit=10)
    return record is not None, bool(text), await artifacts.find_file(mongo, job=job, name="a") is not None


async def test_clean_up_deletes_only_what_exceeds_its_retention(stores: Resources) -> None:
    mongo = stores.mongo
    young = await job_of(mongo, age=timedelta(hours=1))
    week = await job_of(mongo, age=timedelta(days=8))
    month = await job_of(mongo, age=timedelta(days=31))
    waiting = await job_of(mongo, age=timedelta(0), status="pending")
    await recovery.clean_up(cast("WorkerContext", SimpleNamespace(stores=stores)))
    assert await left(mongo, young) == (True, True, True)
    assert await left(mongo, week) == (True, False, False)
    assert await left(mongo, month) == (False, False, False)
    assert await left(mongo, waiting) == (True, True, True)
    assert await mongo["artifacts.chunks"].count_documents({}) == 4  # two artifacts, of two chunks each


async def test_remains_of_a_killed_upload_are_deleted_after_an_hour(stores: Resources) -> None:
    mongo, now = stores.mongo, store.mongo_now()
    for age in (timedelta(hours=2), timedelta(0)):
        job = {"_id": str(uuid4()), "claim": 1}
        killed = await artifacts.Upload.begin(mongo, job=job, name="a", content_type="text/plain", now=now - age)
        await killed.write(b"x" * 300_000)
    await recovery.clean_up(cast("WorkerContext", SimpleNamespace(stores=stores)))
    assert await mongo["artifacts.files"].count_documents({}) == 1
    assert await mongo["artifacts.chunks"].count_documents({}) == 1


async def test_only_the_artifact_of_the_completed_attempt_is_kept(stores: Resources) -> None:
    mongo = stores.mongo
    jobs = [await job_of(mongo, age=timedelta(hours=2)) for _ in range(artifacts.DELETE_BATCH_SIZE + 1)]
    for job in jobs:
        await mongo.jobs.update_one({"_id": job["_id"]}, {"$set": {"claim": 2}})
        second = job | {"claim": 2}
        now = store.mongo_now() - timedelta(hours=2)
        async with artifacts.upload(mongo, job=second, name="a", content_type="text/plain", now=now) as upload:
            await upload.write(b"y")
    await recovery.clean_up(cast("WorkerContext", SimpleNamespace(stores=stores)))
    for job in jobs:
        assert await artifacts.find_file(mongo, job=job, name="a") is None
        assert await artifacts.find_file(mongo, job=job | {"claim": 2}, name="a") is not None
    assert await mongo["artifacts.chunks"].count_documents({}) == len(jobs)
    assert await mongo["artifacts.files"].count_documents({"metadata.unsettledSince": {"$gte": now}}) == 0


async def test_failing_clean_up_step_does_not_block_the_others(
    stores: Resources, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recovery, "CLEAN_UP_STEP_TIMEOUT_SECONDS", 4.0)
    mongo = stores.mongo
    month = await job_of(mongo, age=timedelta(days=31))
    await mongo["artifacts.files"].rename("artifacts.other")
    await mongo.command("create", "artifacts.files", viewOn="artifacts.other", pipeline=[])  # a view cannot be written
    await recovery.clean_up(cast("WorkerContext", SimpleNamespace(stores=stores)))
    assert await store.read(mongo, job=month["_id"]) is None


async def test_an_upload_that_fails_leaves_nothing(stores: Resources) -> None:
    job = {"_id": str(uuid4()), "claim": 1}
    with pytest.raises(RuntimeError):
        await fail_in_the_middle(stores.mongo, job)
    assert await stores.mongo["artifacts.chunks"].count_documents({}) == 0
    assert await artifacts.find_file(stores.mongo, job=job, name="a") is None


async def fail_in_the_middle(mongo: Any, job: dict[str, Any]) -> None:
    async with artifacts.upload(mongo, job=job, name="a", content_type="text/plain", now=store.mongo_now()) as upload:
        await upload.write(b"x" * 600_000)
        raise RuntimeError


async def test_reconciler_runs_during_a_long_clean_up(make_context: MakeContext) -> None:
    started, ticks = asyncio.Event(), 0

    class Busy(MaintenanceWorker):
        async def clean_up(self, _: Any) -> None:
            started.set()
            await asyncio.Event().wait()

        async def reconcile(self, _: Any) -> None:
            nonlocal ticks
            ticks += started.is_set()

    context = await make_context(None)
    maintenance_queue = MaintenanceQueue(context.stores.redis)
    worker = Busy(maintenance_queue, context)
    name = next(name for name in worker.functions if name.endswith("clean_up"))
    await maintenance_queue.enqueue(saq.Job(name, key=f"{maintenance_queue.name}:now", timeout=60))
    running = asyncio.ensure_future(worker.start())
    async with asyncio.timeout(WAIT_TIMEOUT_SECONDS):
        while ticks < 2:
            await asyncio.sleep(0.1)
    await _end_tasks([running, *worker.tasks])
