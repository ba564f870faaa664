"""Cancellation is final: an acknowledged one is never followed by completion, and no process runs on."""

import asyncio
import random
from datetime import UTC, datetime, timedelta
from pathlib import Path
from uuid import uuid4

import pytest

from server.jobs import store
from server.resources import connect
from server.settings import Settings
from tests.actors import Actor
from tests.conftest import MakeActor, MakeServer, environment_of
from tests.jobs.requests import SLEEP_PROGRAM, program_job, submit_job
from tests.processes import Processes
from tests.timeouts import WAIT_TIMEOUT_SECONDS

pytestmark = pytest.mark.usefixtures("worker")


def running(mark: str) -> list[str]:
    """Return the pids of processes with this mark in their arguments."""
    pids = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if mark.encode() in path.read_bytes():
                pids.append(path.parent.name)
        except OSError:
            continue  # the process has just exited
    return pids


async def until(condition, *, seconds: float = WAIT_TIMEOUT_SECONDS) -> None:
    async with asyncio.timeout(seconds):
        while not condition():
            await asyncio.sleep(0.05)


async def test_cancelling_a_running_job_ends_its_processes(alice: Actor) -> None:
    mark = uuid4().hex
    code = f"import subprocess, sys\nsubprocess.run([sys.executable, '-c', 'import time; time.sleep(600)', '{mark}'])"
    job = (await submit_job(alice, program_job(code, args=[mark], timeoutSeconds=60)))["id"]
    await until(lambda: running(mark))
    cancelled = await alice.post(f"/jobs/{job}/cancel")
    assert (cancelled.status, cancelled["status"], cancelled["result"]) == (200, "cancelled", None)
    await until(lambda: not running(mark))
    await asyncio.sleep(0.5)
    read = await alice.get(f"/jobs/{job}")
    assert (read["status"], read["history"][-1]["error"]["code"]) == ("cancelled", "cancelled")


async def test_worker_detects_a_cancellation_without_a_notification(alice: Actor, settings: Settings) -> None:
    mark = uuid4().hex
    job = (await submit_job(alice, program_job("import time\ntime.sleep(600)", args=[mark], timeoutSeconds=60)))["id"]
    await until(lambda: running(mark))
    async with connect(settings) as stores:
        record = await store.read(stores.mongo, job=job)
        assert record is not None
        assert await store.cancel(stores.mongo, job=record, now=store.mongo_now())  # without a notification
    await until(lambda: not running(mark))
    assert (await alice.get(f"/jobs/{job}"))["status"] == "cancelled"


async def test_pending_and_scheduled_jobs_are_cancelled_and_never_run(
    make_server: MakeServer, make_actor: MakeActor, isolated_stores: dict[str, str], processes: Processes
) -> None:
    ada = await make_actor("Ada", await make_server(**isolated_stores, jobs_per_user=1))
    queued, waiting = (await submit_job(ada))["id"], (await submit_job(ada))["id"]
    scheduled = (await submit_job(ada, runAt=(datetime.now(UTC) + timedelta(seconds=3)).isoformat()))["id"]
    for job in (queued, waiting, scheduled):
        assert (await ada.post(f"/jobs/{job}/cancel"))["status"] == "cancelled"
    again = await ada.post(f"/jobs/{scheduled}/cancel")
    assert (again.status, again.code) == (409, "not_cancellable")
    processes.worker(**environment_of(isolated_stores), JOBS_PER_USER="1").ready()
    last = await ada.finished_job((await submit_job(ada))["id"])
    assert last["status"] == "completed"
    for job in (queued, waiting, scheduled):
        read = await ada.get(f"/jobs/{job}")
        assert (read["status"], read["startedAt"], read["history"]) == ("cancelled", None, [])


async def test_a_finished_job_cannot_be_cancelled(alice: Actor) -> None:
    job = (await submit_job(alice))["id"]
    await alice.finished_job(job)
    refused = await alice.post(f"/jobs/{job}/cancel")
    assert (refused.status, refused.code) == (409, "not_cancellable")
    assert (await alice.get(f"/jobs/{job}"))["status"] == "completed"


async def test_cancelled_job_can_be_retried(alice: Actor) -> None:
    job = (await submit_job(alice, program_job(SLEEP_PROGRAM.format(seconds=0)), runAt="2100-01-01T00:00:00Z"))["id"]
    await alice.post(f"/jobs/{job}/cancel")
    again = await alice.post(f"/jobs/{job}/retry")
    assert (again.status, again["runAt"], again["completedAt"]) == (202, None, None)
    assert (await alice.finished_job(job))["status"] == "completed"


async def test_no_job_completes_after_its_cancellation_was_acknowledged(alice: Actor, full: bool) -> None:
    mark = uuid4().hex
    acknowledged = [await cancel_after(alice, mark, random.uniform(0, 0.25)) for _ in range(100 if full else 20)]
    await asyncio.sleep(1)
    for job, status in acknowledged:
        assert (await alice.get(f"/jobs/{job}"))["status"] == status
    assert {status for _, status in acknowledged} <= {"cancelled", "completed"}
    await until(lambda: not running(mark))


async def cancel_after(actor: Actor, mark: str, seconds: float) -> tuple[str, str]:
    """Cancel a new job after a delay; return it and its acknowledged status: it may have completed before."""
    job = (await submit_job(actor, program_job("import time\ntime.sleep(0.05)", args=[mark])))["id"]
    await asyncio.sleep(seconds)
    response = await actor.post(f"/jobs/{job}/cancel")
    if response.status == 409:
        return job, "completed"
    return job, response["status"]
