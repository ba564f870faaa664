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
from server.jobs.attempt import Attempt
from server.jobs.dispatch import Dispatcher
from server.jobs.handlers import DISPATCHER
from server.jobs.leases import Answers
from server.jobs.lifecycle import Bench
from server.jobs.store import Job
from server.jobs.types import JOB_TYPES
from server.resources import connect
from server.settings import Settings
from tests.actors import Actor
from tests.faults import Mode, Network
from tests.jobs.asking import ask
from tests.jobs.conftest import MakeBench, ask_for
from tests.patience import PATIENCE_SECONDS


async def said(bench: Bench, job: Job) -> str:
    items, _ = await output.read(bench.stores.mongo, job=job["_id"], after=0, limit=100)
    return "".join(item["text"] for item in items)


async def read(bench: Bench, job: Job) -> Job:
    record = await store.read(bench.stores.mongo, job=job["_id"])
    assert record is not None
    return record


async def until(condition: Any, *, seconds: float = PATIENCE_SECONDS) -> None:
    async with asyncio.timeout(seconds):
        while not await condition():
            await asyncio.sleep(0.02)


@pytest.fixture
async def network(quiet: dict[str, str]) -> AsyncIterator[Network]:
    async with Network.to({"mongodb_uri": quiet["mongodb_uri"]}) as proxies:
        yield proxies


@pytest.mark.parametrize(("timeout", "fails", "code"), [(5, False, "timeout"), (600, True, "error")])
async def test_output_before_a_failure_is_stored(make_bench: MakeBench, timeout: float, fails: bool, code: str) -> None:
    async def run(attempt: Attempt, _: Any) -> dict[str, Any]:
        attempt.output.add("stdout", 0, "first\n")
        await asyncio.sleep(0.2)
        attempt.output.add("stdout", 0, "last\n")
        if fails:
            raise RuntimeError
        await asyncio.sleep(600)
        return {}

    bench = await make_bench(run, timeout=timeout)
    job = await ask_for(bench)
    await lifecycle.attempt(bench, job=job["_id"], claim=1)
    assert (await read(bench, job))["error"]["code"] == code
    assert await said(bench, job) == "first\nlast\n"


async def test_output_after_a_cancellation_is_stored_and_waited_for(make_bench: MakeBench) -> None:
    async def run(attempt: Attempt, _: Any) -> dict[str, Any]:
        attempt.output.add("stdout", 0, "ready\n")
        try:
            await asyncio.sleep(600)
        finally:
            attempt.output.add("stdout", 0, "last\n")
        return {}

    bench = await make_bench(run)
    job = await ask_for(bench)
    running = asyncio.ensure_future(lifecycle.attempt(bench, job=job["_id"], claim=1))
    await until(lambda: said(bench, job))
    cancelled = await read(bench, job)
    assert await store.cancel(bench.stores.mongo, job=cancelled, now=store.moment())
    assert not store.has_settled(cancelled, now=store.moment())
    bench.leases.drop(job["_id"])
    await running
    assert await said(bench, job) == "ready\nlast\n"
    assert store.has_settled(cancelled, now=store.moment() + timedelta(seconds=4))


@pytest.mark.hurried("mongodb_uri")
async def test_failed_progress_write_does_not_fail_the_attempt(make_bench: MakeBench, network: Network) -> None:
    mongo = network.stores["mongodb_uri"]

    async def run(attempt: Attempt, _: Any) -> dict[str, Any]:
        await mongo.turn(Mode.STOPPED)
        await attempt.progress(50)
        await mongo.turn(Mode.PASS)
        return {"done": True}

    bench = await make_bench(run, **network.urls)
    job = await ask_for(bench)
    await lifecycle.attempt(bench, job=job["_id"], claim=1)
    assert (await read(bench, job))["result"] == {"done": True}


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
        assert await lifecycle._patiently(operation) == ("answer", True)
    else:
        with pytest.raises(OperationFailure):
            await lifecycle._patiently(operation)


async def test_attempt_claimed_during_shutdown_is_requeued(make_bench: MakeBench, network: Network) -> None:
    async def run(_: Attempt, __: Any) -> dict[str, Any]:
        raise AssertionError("the attempt must not start")

    bench = await make_bench(run, **network.urls)
    job = await ask_for(bench)
    await network.stores["mongodb_uri"].turn(Mode.SLOW)
    claiming = asyncio.ensure_future(lifecycle.attempt(bench, job=job["_id"], claim=1))
    while await bench.leases.until_none(seconds=0):
        await asyncio.sleep(0)
    bench.leases.stop_all()
    await claiming
    assert await bench.leases.until_none(seconds=0)
    requeued = await read(bench, job)
    assert (requeued["status"], requeued["attempts"], requeued["history"][0]["error"]["code"]) == (
        "pending",
        0,
        "handed_back",
    )


async def test_message_with_a_wrong_claim_does_not_stop_the_running_attempt(make_bench: MakeBench) -> None:
    go = asyncio.Event()

    async def run(_: Attempt, __: Any) -> dict[str, Any]:
        await go.wait()
        return {}

    bench = await make_bench(run)
    job = await ask_for(bench)
    running = asyncio.ensure_future(lifecycle.attempt(bench, job=job["_id"], claim=1))

    async def processing() -> bool:
        return bool((await read(bench, job))["status"] == "processing")

    await until(processing)
    for claim in (0, 2):
        await lifecycle.attempt(bench, job=job["_id"], claim=claim)
    await bench.leases._look(renew=True)
    assert not await bench.leases.until_none(seconds=0)
    go.set()
    await running
    done = await read(bench, job)
    assert (done["status"], done["attempts"]) == ("completed", 1)


async def test_artifact_of_a_superseded_attempt_is_deleted_and_its_successors_is_kept(make_bench: MakeBench) -> None:
    go = asyncio.Event()

    async def run(attempt: Attempt, _: Any) -> dict[str, Any]:
        mongo, job, now = attempt.stores.mongo, attempt.record, store.moment()
        text = f"of claim {job['claim']}"
        async with artifacts.upload(mongo, job=job, name="a", content_type="text/plain", now=now) as upload:
            await upload.write(text.encode())
        if job["claim"] == 1:
            await go.wait()
        return {"artifact": artifacts.described(upload, job=job, name="a", now=now)}

    bench = await make_bench(run)
    mongo, job = bench.stores.mongo, await ask_for(bench)
    first = asyncio.ensure_future(lifecycle.attempt(bench, job=job["_id"], claim=1))

    async def uploaded() -> bool:
        return bool(await mongo[artifacts.FILES].find_one({"length": {"$gt": 0}}))

    await until(uploaded)
    assert await store.take_back(mongo, job=await read(bench, job), now=store.moment())
    await lifecycle.attempt(bench, job=job["_id"], claim=2)
    go.set()
    await first
    done = await read(bench, job)
    file = await artifacts.find(mongo, job=done, name="a")
    assert [chunk async for chunk in artifacts.chunks(mongo, file=file, start=0, stop=100)] == [b"of claim 2"]
    assert await mongo[artifacts.FILES].count_documents({}) == await mongo[artifacts.CHUNKS].count_documents({}) == 1
    assert [attempt["error"] and attempt["error"]["code"] for attempt in done["history"]] == ["worker_lost", None]


def test_leases_are_judged_only_after_mongodb_has_responded_for_a_while() -> None:
    availability = Answers()
    assert not availability.are_steady(100)
    for now in range(100, 110):
        availability.note(now)
    assert availability.are_steady(109)
    assert not availability.are_steady(109 + Answers.BREAK_SECONDS + 0.1)
    availability.note(120)
    assert not availability.are_steady(124)
    for now in range(121, 127):
        availability.note(now)
    assert availability.are_steady(126)


@pytest.mark.hurried("mongodb_uri")
async def test_attempt_survives_a_mongodb_outage_longer_than_its_lease(
    make_bench: MakeBench, network: Network, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store, "LEASE", timedelta(seconds=2.5))
    monkeypatch.setattr(leases, "LOOK_SECONDS", 0.3)
    monkeypatch.setattr(Answers, "BREAK_SECONDS", 1.5)
    monkeypatch.setattr(Answers, "STEADY_SECONDS", 2.5)
    go, mongo = asyncio.Event(), network.stores["mongodb_uri"]

    async def run(_: Attempt, __: Any) -> dict[str, Any]:
        await go.wait()
        return {}

    holder, other = [await make_bench(run, **network.urls) for _ in range(2)]
    beside = await make_bench(run)  # reaches MongoDB all the time
    renewals = [asyncio.ensure_future(bench.leases.keep()) for bench in (holder, other)]
    job = await ask_for(holder)
    running = asyncio.ensure_future(lifecycle.attempt(holder, job=job["_id"], claim=1))
    async with asyncio.timeout(PATIENCE_SECONDS):
        while not other.leases.can_judge():
            await asyncio.sleep(0.05)
    await mongo.turn(Mode.STOPPED)

    async def has_lapsed() -> bool:
        return bool((await read(beside, job))["lease"] < store.moment())

    await until(has_lapsed)  # the job could be reclaimed
    await mongo.turn(Mode.PASS)
    async with asyncio.timeout(PATIENCE_SECONDS):
        while not other.leases.can_judge():
            with suppress(PyMongoError):
                await recovery.take_back_lost(other)
            await asyncio.sleep(0.02)
    await recovery.take_back_lost(other)
    go.set()
    await running
    done = await read(other, job)
    assert (done["status"], len(done["history"])) == ("completed", 1)
    for task in renewals:
        task.cancel()
    await asyncio.gather(*renewals, return_exceptions=True)


async def test_attempt_of_a_lost_worker_is_reclaimed(make_bench: MakeBench) -> None:
    async def run(_: Attempt, __: Any) -> dict[str, Any]:
        return {}

    bench = await make_bench(run)
    job = await ask_for(bench)
    long_ago = store.moment() - timedelta(seconds=20)
    await store.claim(bench.stores.mongo, job=job["_id"], claim=1, worker="lost", now=long_ago)
    await recovery.take_back_lost(bench)
    assert (await read(bench, job))["status"] == "processing"  # MongoDB has not responded to it for long enough
    for ago in range(6, -1, -1):
        bench.leases._answers.note(time.monotonic() - ago)
    await recovery.take_back_lost(bench)
    assert (await read(bench, job))["status"] == "pending"


@pytest.mark.hurried("mongodb_uri")
async def test_stored_change_is_acknowledged_and_announced_even_if_mongodb_fails_afterwards(
    settings: Settings, quiet: dict[str, str], network: Network, http: aiohttp.ClientSession
) -> None:
    replaced = dataclasses.replace(settings, **quiet, jobs_per_user=1)
    async with connect(replaced) as stores, connect(dataclasses.replace(replaced, **network.urls)) as failing:
        app = create_app(replaced, stores)
        # After the write, the dispatcher uses a connection on which MongoDB fails.
        app[DISPATCHER] = Dispatcher(failing.mongo, stores.redis, types=JOB_TYPES, slots=1)
        async with TestServer(app) as server:
            ada = await Actor(http, str(server.make_url("")), "Ada").register()
            socket = await ada.connect()
            await network.stores["mongodb_uri"].turn(Mode.STOPPED)
            queued, waiting = [(await ask(ada))["id"] for _ in range(2)]
            assert (await ada.post(f"/jobs/{queued}/cancel")).status == 200
            assert (await ada.post(f"/jobs/{queued}/retry")).status == 202
            announced = [(await socket.assert_push("job:updated"))["job"] for _ in range(4)]
            await socket.close()
    statuses = [(queued, "pending"), (waiting, "pending"), (queued, "cancelled"), (queued, "pending")]
    assert [(job["id"], job["status"]) for job in announced] == statuses


async def test_jobs_of_an_unknown_type_are_left_to_newer_workers(make_bench: MakeBench) -> None:
    async def run(_: Attempt, __: Any) -> dict[str, Any]:
        return {}

    bench = await make_bench(run)
    mongo = bench.stores.mongo
    newer = await ask_for(bench, type="NEWER", priority=10)
    known = await ask_for(bench)
    await mongo.jobs.update_many({}, {"$set": {"slot": None, "sentAt": None, "userId": known["userId"]}})
    await recovery.fill_slots(bench, scheduled_only=False)
    await bench.dispatcher.hand_on(known["userId"], 3)
    assert [(await read(bench, job))["slot"] for job in (newer, known)] == [None, 0]
    sent = store.moment() - timedelta(minutes=1)
    await mongo.jobs.update_many({}, {"$set": {"sentAt": sent}})
    await recovery.send_missing(bench)
    assert (await read(bench, newer))["sentAt"] == sent
    assert (await read(bench, known))["sentAt"] > sent


async def test_cancel_does_not_release_a_slot_assigned_after_the_read(make_bench: MakeBench) -> None:
    async def run(_: Attempt, __: Any) -> dict[str, Any]:
        return {}

    bench = await make_bench(run)
    mongo, job = bench.stores.mongo, await ask_for(bench)
    await mongo.jobs.update_one({"_id": job["_id"]}, {"$set": {"slot": None}})
    as_read = await read(bench, job)
    assert await store.take_slot(mongo, job=await read(bench, job), slot=1, now=store.moment())
    assert not await store.cancel(mongo, job=as_read, now=store.moment())
    assert await store.cancel(mongo, job=await read(bench, job), now=store.moment())
