"""The worker process as operators see it: shutdown, supervision and warnings."""

import asyncio
import dataclasses
import os
import re
import signal
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import aiohttp
import pymongo
from structlog.testing import capture_logs

from server.settings import Settings
from server.worker import _warn_about_quota
from tests.actors import Actor
from tests.conftest import environment_of
from tests.devstack.pids import all_exited, children_of
from tests.jobs.requests import SLEEP_PROGRAM, program_job, submit_job
from tests.processes import Processes, Worker
from tests.timeouts import WAIT_TIMEOUT_SECONDS


async def test_idle_worker_exits_without_waiting_for_the_grace_period(
    processes: Processes, isolated_stores: dict[str, str]
) -> None:
    worker = processes.worker(**environment_of(isolated_stores), override="server.worker.JOB_GRACE_SECONDS=600").ready()
    assert await asyncio.to_thread(worker.terminate) == 0


async def test_a_busy_worker_lets_its_job_finish(
    processes: Processes,
    isolated_stores: dict[str, str],
    http: aiohttp.ClientSession,
) -> None:
    variables = environment_of(isolated_stores)
    worker, server = processes.worker(**variables), processes.server(**variables)
    ada = await Actor(http, server.base, "Ada").register()
    worker.ready()
    job = (await submit_job(ada, program_job(SLEEP_PROGRAM.format(seconds=2))))["id"]
    await started(ada, job)
    children = list(children_of(worker.pid).values())
    assert await asyncio.to_thread(worker.terminate) == 0
    assert all_exited(children, seconds=WAIT_TIMEOUT_SECONDS)
    done = await ada.get(f"/jobs/{job}")
    assert (done["status"], done["attempts"], done["result"]["stdout"]) == ("completed", 1, "done\n")


async def started(actor: Actor, job: str) -> None:
    async with asyncio.timeout(WAIT_TIMEOUT_SECONDS):
        while (await actor.get(f"/jobs/{job}"))["status"] != "processing":
            await asyncio.sleep(0.02)


async def test_busy_worker_requeues_its_job_after_the_grace_period_without_counting_the_attempt(
    processes: Processes, isolated_stores: dict[str, str], http: aiohttp.ClientSession, full: bool
) -> None:
    variables = environment_of(isolated_stores)
    grace = "" if full else "server.worker.JOB_GRACE_SECONDS=1"
    worker, server = processes.worker(**variables, override=grace).ready(), processes.server(**variables)
    ada = await Actor(http, server.base, "Ada").register()
    job = (await submit_job(ada, program_job(SLEEP_PROGRAM.format(seconds=40), timeoutSeconds=60)))["id"]
    await started(ada, job)
    assert await asyncio.to_thread(worker.terminate) == 0
    requeued = await ada.get(f"/jobs/{job}")
    assert (requeued["status"], requeued["attempts"], requeued["history"][0]["error"]["code"]) == (
        "pending",
        0,
        "handed_back",
    )


async def test_processes_are_supervised_replaced_and_drained(
    processes: Processes, isolated_stores: dict[str, str], http: aiohttp.ClientSession
) -> None:
    variables = environment_of(isolated_stores)
    server = processes.server(**variables)
    ada = await Actor(http, server.base, "Ada").register()
    supervisor = processes.worker("--processes", "2", "--queues", "high,normal", **variables)
    await workers(ada, 2)
    first = members(supervisor)
    os.kill(first[0], signal.SIGKILL)
    async with asyncio.timeout(WAIT_TIMEOUT_SECONDS):
        while len(members(supervisor)) < 2 or first[0] in members(supervisor):
            await asyncio.sleep(0.05)
    assert first[1] in members(supervisor)
    await workers(ada, 3)  # the killed worker stays registered for 30 s
    job = (await submit_job(ada, program_job(SLEEP_PROGRAM.format(seconds=2))))["id"]
    await started(ada, job)
    pids = members(supervisor)
    assert await asyncio.to_thread(supervisor.terminate) == 0
    assert all_exited(pids, seconds=WAIT_TIMEOUT_SECONDS)
    assert (await ada.get(f"/jobs/{job}"))["status"] == "completed"


async def test_a_rolling_restart_of_workers_lets_their_jobs_finish(
    processes: Processes, isolated_stores: dict[str, str], http: aiohttp.ClientSession
) -> None:
    variables = environment_of(isolated_stores)
    server, supervisor = processes.server(**variables), processes.worker("--processes", "1", **variables)
    ada = await Actor(http, server.base, "Ada").register()
    job = (await submit_job(ada, program_job(SLEEP_PROGRAM.format(seconds=2))))["id"]
    await started(ada, job)
    [old] = members(supervisor)
    os.kill(supervisor.pid, signal.SIGHUP)
    await asyncio.to_thread(supervisor.wait_for_output, "processes restarted")
    assert old not in members(supervisor)
    assert len(members(supervisor)) == 1
    done = await ada.get(f"/jobs/{job}")
    assert (done["status"], done["attempts"], len(done["history"])) == ("completed", 1, 1)
    assert await asyncio.to_thread(supervisor.terminate) == 0


async def test_processes_do_not_outlive_a_killed_supervisor(
    processes: Processes, isolated_stores: dict[str, str]
) -> None:
    supervisor = processes.worker("--processes", "2", **environment_of(isolated_stores))
    while len(re.findall("worker ready", supervisor.output)) < 2:
        await asyncio.sleep(0.05)
    pids = members(supervisor)
    supervisor.kill()
    assert all_exited(pids, seconds=WAIT_TIMEOUT_SECONDS)


async def test_worker_exits_with_an_error_if_a_background_task_fails(
    processes: Processes, isolated_stores: dict[str, str]
) -> None:
    worker = processes.worker(**environment_of(isolated_stores)).ready()
    with pymongo.MongoClient[dict[str, Any]](isolated_stores["mongodb_uri"]) as client:
        broken = {"userId": "x", "status": "pending", "slot": None, "type": "EXPORT", "runAt": datetime.now(UTC)}
        client.get_default_database()["jobs"].insert_one(broken)  # not a record that the server writes
    assert await asyncio.to_thread(worker.wait) == 1
    assert "worker background task failed" in worker.output


def test_start_warns_if_one_user_can_fill_a_worker(settings: Settings) -> None:
    with capture_logs() as logs:
        _warn_about_quota(dataclasses.replace(settings, jobs_per_user=3, worker_concurrency=4))
    assert logs == []
    with capture_logs() as logs:
        _warn_about_quota(dataclasses.replace(settings, jobs_per_user=4, worker_concurrency=4))
    assert [entry["log_level"] for entry in logs] == ["warning"]


def members(supervisor: Worker) -> list[int]:
    return [int(pid) for pid in Path(f"/proc/{supervisor.pid}/task/{supervisor.pid}/children").read_text().split()]


async def workers(actor: Actor, number: int) -> None:
    """Wait until this many workers are registered."""
    async with asyncio.timeout(WAIT_TIMEOUT_SECONDS):
        while (await actor.get("/jobs/stats"))["queue"]["workers"] != number:
            await asyncio.sleep(0.1)
