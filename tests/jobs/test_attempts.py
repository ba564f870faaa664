"""An attempt from its message to its outcome, in the test process, also with faults of MongoDB."""

import asyncio
import dataclasses
import time
from collections.abc import AsyncIterator
from contextlib import suppress
from datetime import timedelta
from typing import Any

import aiohttp
import pytest
from aiohttp.test_utils import TestServer
from pymongo.errors import AutoReconnect, ExecutionTimeout, OperationFailure, PyMongoError

from server.app import create_app
from server.jobs import artifacts, leases, lifecycle, output, recovery, store
from server.jobs.attempt_context import AttemptContext
from server.jobs.dispatch import Dispatcher
from server.jobs.handlers import DISPATCHER
from server.jobs.leases import MongoAvailability
from server.jobs.lifecycle import WorkerContext
from server.jobs.store import JobRecord
from server.jobs.types import JOB_TYPES
from server.resources import connect
from server.settings import Settings
from tests.actors import Actor
from tests.faults import FaultyNetwork, Mode
from tests.jobs.conftest import MakeContext, create_record
from tests.jobs.requests import submit_job
from tests.timeouts import WAIT_TIMEOUT_SECONDS


async def read_output(context: WorkerContext, job: JobRecord) -> str:
    items, _ = await output.read(context.stores.mongo, job=job["_id"], after=0, limit=100)
    return "".join(item["text"] for item in items)


async def read(context: WorkerContext, job: JobRecord) -> JobRecord:
    record = await store.read(context.stores.mongo, job=job["_id"])
    assert record is not None
    return record


async def until(condition: Any, *, seconds: float = WAIT_TIMEOUT_SECONDS) -> None:
    async with asyncio.timeout(seconds):
        while not await condition():
            await asyncio.sleep(0.02)


@pytest.fixture
async def network(isolated_stores: dict[str, str]) -> AsyncIterator[FaultyNetwork]:
    async with FaultyNetwork.start({"mongodb_uri": isolated_stores["mongodb_uri"]}) as proxies:
        yield proxies


@pytest.mark.parametrize(("timeout", "fails", "code"), [(5, False, "timeout"), (600, True, "error")])
async def test_output_before_a_failure_is_stored(
    make_context: MakeContext, timeout: float, fails: bool, code: str
) -> None:
    async def run(attempt: AttemptContext, _: Any) -> dict[str, Any]:
        attempt.output.add("stdout", 0, "first\n")
        await asyncio.sleep(0.2)
        attempt.output.add("stdout", 0, "last\n")
        if fails:
            raise RuntimeError
        await asyncio.sleep(600)
        return {}

    context = await make_context(run, timeout=timeout)
    job = await create_record(context)
    await lifecycle.run_attempt(context, job=job["_id"], claim=1)
    assert (await read(context, job))["error"]["code"] == code
    assert await read_output(context, job) == "first\nlast\n"


async def test_output_after_a_cancellation_is_stored_and_waited_for(make_context: MakeContext) -> None:
    async def run(attempt: AttemptContext, _: Any) -> dict[str, Any]:
        attempt.output.add("stdout", 0, "ready\n")
        try:
            await asyncio.sleep(600)
        finally:
            attempt.output.add("stdout", 0, "last\n")
        return {}

    context = await make_context(run)
    job = await create_record(context)
    running = asyncio.ensure_future(lifecycle.run_attempt(context, job=job["_id"], claim=1))
    await until(lambda: read_output(context, job))
    cancelled = await read(context, job)
    assert await store.cancel(context.stores.mongo, job=cancelled, now=store.mongo_now())
    assert not store.is_output_complete(cancelled, now=store.mongo_now())
    context.leases.cancel(job["_id"])
    await running
    assert await read_output(context, job) == "ready\nlast\n"
    assert store.is_output_complete(cancelled, now=store.mongo_now() + timedelta(seconds=4))


@pytest.mark.real_timeouts("mongodb_uri")
async def test_failed_progress_write_does_not_fail_the_attempt(
    make_context: MakeContext, network: FaultyNetwork
) -> None:
    mongo = network.stores["mongodb_uri"]

    async def run(attempt: AttemptContext, _: Any) -> dict[str, Any]:
        await mongo.set_mode(Mode.STOPPED)
        await attempt.report_progress(50)
        await mongo.set_mode(Mode.PASS)
        return {"done": True}

    context = await make_context(run, **network.urls)
    job = await create_record(context)
    await lifecycle.run_attempt(context, job=job["_id"], claim=1)
    assert (await read(context, job))["result"] == {"done": True}


@pytest.mark.parametrize(
    ("error", "waits"),
    [(ExecutionTimeout("too slow", 50), True), (AutoReconnect("away"), True), (OperationFailure("no", 2), False)],
)
async def test_only_transient_mongodb_errors_are_retried(error: PyMongoError, waits: bool) -> None:
    errors = [error]

    async def operation() -> str:
        if errors:
            raise errors.pop()
        return "answer"

    if waits:
        assert await lifecycle._retry_mongo(operation) == ("answer", True)
    else:
        with pytest.raises(OperationFailure):
            await lifecycle._retry_mongo(operation)


async def test_attempt_claimed_during_shutdown_is_requeued(make_context: MakeContext, network: FaultyNetwork) -> None:
    async def run(_: AttemptContext, __: Any) -> dict[str, Any]:
        raise AssertionError("the attempt must not start")

    context = await make_context(run, **network.urls)
    job = await create_record(context)
    await network.stores["mongodb_uri"].set_mode(Mode.SLOW)
    claiming = asyncio.ensure_future(lifecycle.run_attempt(context, job=job["_id"], claim=1))
    while await context.leases.wait_idle(timeout=0):
        await asyncio.sleep(0)
    context.leases.stop_all()
    await claiming
    assert await context.leases.wait_idle(timeout=0)
    requeued = await read(context, job)
    assert (requeued["status"], requeued["attempts"], requeued["history"][0]["error"]["code"]) == (
        "pending",
        0,
        "handed_back",
    )


async def test_message_with_a_wrong_claim_does_not_stop_the_running_attempt(make_context: MakeContext) -> None:
    go = asyncio.Event()

    async def run(_: AttemptContext, __: Any) -> dict[str, Any]:
        await go.wait()
        return {}

    context = await make_context(run)
    job = await create_record(context)
    running = asyncio.ensure_future(lifecycle.run_attempt(context, job=job["_id"], claim=1))

    async def processing() -> bool:
        return bool((await read(context, job))["status"] == "processing")

    await until(processing)
    for claim in (0, 2):
        await lifecycle.run_attempt(context, job=job["_id"], claim=claim)
    await context.leases._check(renew=True)
    assert not await context.leases.wait_idle(timeout=0)
    go.set()
    await running
    done = await read(context, job)
    assert (done["status"], done["attempts"]) == ("completed", 1)


async def test_artifact_of_a_superseded_attempt_is_deleted_and_its_successors_is_kept(
    make_context: MakeContext,
) -> None:
    go = asyncio.Event()

    async def run(attempt: AttemptContext, _: Any) -> dict[str, Any]:
        mongo, job, now = attempt.stores.mongo, attempt.record, store.mongo_now()
        text = f"of claim {job['claim']}"
        async with artifacts.upload(mongo, job=job, name="a", content_type="text/plain", now=now) as upload:
            await upload.write(text.encode())
        if job["claim"] == 1:
            await go.wait()
        return {"artifact": artifacts.result_entry(upload, job=job, name="a", now=now)}

    context = await make_context(run)
    mongo, job = context.stores.mongo, await create_record(context)
    first = asyncio.ensure_future(lifecycle.run_attempt(context, job=job["_id"], claim=1))

    async def uploaded() -> bool:
        return bool(await mongo[artifacts.FILES_COLLECTION].find_one({"length": {"$gt": 0}}))

    await until(uploaded)
    assert await store.reclaim(mongo, job=await read(context, job), now=store.mongo_now())
    await lifecycle.run_attempt(context, job=job["_id"], claim=2)
    go.set()
    await first
    done = await read(context, job)
    file = await artifacts.find_file(mongo, job=done, name="a")
    assert [chunk async for chunk in artifacts.read_chunks(mongo, file=file, start=0, stop=100)] == [b"of claim 2"]
    assert (
        await mongo[artifacts.FILES_COLLECTION].count_documents({})
        == await mongo[artifacts.CHUNKS_COLLECTION].count_documents({})
        == 1
    )
    assert [attempt["error"] and attempt["error"]["code"] for attempt in done["history"]] == ["worker_lost", None]


def test_leases_are_judged_only_after_mongodb_has_responded_for_a_while() -> None:
    availability = MongoAvailability()
    assert not availability.is_stable(100)
    for now in range(100, 110):
        availability.record_response(now)
    assert availability.is_stable(109)
    assert not availability.is_stable(109 + MongoAvailability.MAX_GAP_SECONDS + 0.1)
    availability.record_response(120)
    assert not availability.is_stable(124)
    for now in range(121, 127):
        availability.record_response(now)
    assert availability.is_stable(126)


@pytest.mark.real_timeouts("mongodb_uri")
async def test_attempt_survives_a_mongodb_outage_longer_than_its_lease(
    make_context: MakeContext, network: FaultyNetwork, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store, "LEASE_DURATION", timedelta(seconds=2.5))
    monkeypatch.setattr(leases, "LEASE_CHECK_INTERVAL_SECONDS", 0.3)
    monkeypatch.setattr(MongoAvailability, "MAX_GAP_SECONDS", 1.5)
    monkeypatch.setattr(MongoAvailability, "MIN_STABLE_SECONDS", 2.5)
    go, mongo = asyncio.Event(), network.stores["mongodb_uri"]

    async def run(_: AttemptContext, __: Any) -> dict[str, Any]:
        await go.wait()
        return {}

    holder, other = [await make_context(run, **network.urls) for _ in range(2)]
    beside = await make_context(run)  # reaches MongoDB all the time
    renewals = [asyncio.ensure_future(context.leases.renew_forever()) for context in (holder, other)]
    job = await create_record(holder)
    running = asyncio.ensure_future(lifecycle.run_attempt(holder, job=job["_id"], claim=1))
    async with asyncio.timeout(WAIT_TIMEOUT_SECONDS):
        while not other.leases.can_reclaim():
            await asyncio.sleep(0.05)
    await mongo.set_mode(Mode.STOPPED)

    async def has_lapsed() -> bool:
        return bool((await read(beside, job))["lease"] < store.mongo_now())

    await until(has_lapsed)  # the job could be reclaimed
    await mongo.set_mode(Mode.PASS)
    async with asyncio.timeout(WAIT_TIMEOUT_SECONDS):
        while not other.leases.can_reclaim():
            with suppress(PyMongoError):
                await recovery.reclaim_expired(other)
            await asyncio.sleep(0.02)
    await recovery.reclaim_expired(other)
    go.set()
    await running
    done = await read(other, job)
    assert (done["status"], len(done["history"])) == ("completed", 1)
    for task in renewals:
        task.cancel()
    await asyncio.gather(*renewals, return_exceptions=True)


async def test_attempt_of_a_lost_worker_is_reclaimed(make_context: MakeContext) -> None:
    async def run(_: AttemptContext, __: Any) -> dict[str, Any]:
        return {}

    context = await make_context(run)
    job = await create_record(context)
    long_ago = store.mongo_now() - timedelta(seconds=20)
    await store.claim(context.stores.mongo, job=job["_id"], claim=1, worker="lost", now=long_ago)
    await recovery.reclaim_expired(context)
    assert (await read(context, job))["status"] == "processing"  # MongoDB has not responded to it for long enough
    for ago in range(6, -1, -1):
        context.leases._mongo_availability.record_response(time.monotonic() - ago)
    await recovery.reclaim_expired(context)
    assert (await read(context, job))["status"] == "pending"


@pytest.mark.real_timeouts("mongodb_uri")
async def test_stored_change_is_acknowledged_and_announced_even_if_mongodb_fails_afterwards(
    settings: Settings, isolated_stores: dict[str, str], network: FaultyNetwork, http: aiohttp.ClientSession
) -> None:
    replaced = dataclasses.replace(settings, **isolated_stores, jobs_per_user=1)
    async with connect(replaced) as stores, connect(dataclasses.replace(replaced, **network.urls)) as failing:
        app = create_app(replaced, stores)
        # After the write, the dispatcher uses a connection on which MongoDB fails.
        app[DISPATCHER] = Dispatcher(failing.mongo, stores.redis, types=JOB_TYPES, slots=1)
        async with TestServer(app) as server:
            ada = await Actor(http, str(server.make_url("")), "Ada").register()
            socket = await ada.connect()
            await network.stores["mongodb_uri"].set_mode(Mode.STOPPED)
            queued, waiting = [(await submit_job(ada))["id"] for _ in range(2)]
            assert (await ada.post(f"/jobs/{queued}/cancel")).status == 200
            assert (await ada.post(f"/jobs/{queued}/retry")).status == 202
            announced = [(await socket.assert_push("job:updated"))["job"] for _ in range(4)]
            await socket.close()
    statuses = [(queued, "pending"), (waiting, "pending"), (queued, "cancelled"), (queued, "pending")]
    assert [(job["id"], job["status"]) for job in announced] == statuses


async def test_jobs_of_an_unknown_type_are_left_to_newer_workers(make_context: MakeContext) -> None:
    async def run(_: AttemptContext, __: Any) -> dict[str, Any]:
        return {}

    context = await make_context(run)
    mongo = context.stores.mongo
    newer = await create_record(context, type="NEWER", priority=10)
    known = await create_record(context)
    await mongo.jobs.update_many({}, {"$set": {"slot": None, "sentAt": None, "userId": known["userId"]}})
    await recovery.admit_waiting_jobs(context, scheduled_only=False)
    await context.dispatcher.release_slot(known["userId"], 3)
    assert [(await read(context, job))["slot"] for job in (newer, known)] == [None, 0]
    sent = store.mongo_now() - timedelta(minutes=1)
    await mongo.jobs.update_many({}, {"$set": {"sentAt": sent}})
    await recovery.redeliver_missing(context)
    assert (await read(context, newer))["sentAt"] == sent
    assert (await read(context, known))["sentAt"] > sent


async def test_cancel_does_not_release_a_slot_assigned_after_the_read(make_context: MakeContext) -> None:
    async def run(_: AttemptContext, __: Any) -> dict[str, Any]:
        return {}

    context = await make_context(run)
    mongo, job = context.stores.mongo, await create_record(context)
    await mongo.jobs.update_one({"_id": job["_id"]}, {"$set": {"slot": None}})
    as_read = await read(context, job)
    assert await store.take_slot(mongo, job=await read(context, job), slot=1, now=store.mongo_now())
    assert not await store.cancel(mongo, job=as_read, now=store.mongo_now())
    assert await store.cancel(mongo, job=await read(context, job), now=store.mongo_now())


async def test_message_from_before_a_cancellation_does_not_start_the_retried_job(make_context: MakeContext) -> None:
    async def run(_: AttemptContext, __: Any) -> dict[str, Any]:
        return {}

    context = await make_context(run)
    mongo, now, job = context.stores.mongo, store.mongo_now(), await create_record(context)
    assert await store.cancel(mongo, job=job, now=now)
    assert await store.retry(mongo, job=await read(context, job), now=now)
    assert await store.claim(mongo, job=job["_id"], claim=job["claim"] + 1, worker="worker", now=now) is None
    retried = await read(context, job)
    assert retried["status"] == store.PENDING
    assert await store.claim(mongo, job=job["_id"], claim=retried["claim"] + 1, worker="worker", now=now)
