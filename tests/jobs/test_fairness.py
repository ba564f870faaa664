"""Fair scheduling: a user with many jobs does not delay other users."""

import asyncio
from datetime import datetime, timedelta

import aiohttp

from tests.actors import Actor
from tests.conftest import environment_of
from tests.jobs.requests import SLEEP_PROGRAM, program_job, submit_job
from tests.processes import Processes
from tests.timeouts import WAIT_TIMEOUT_SECONDS


async def test_many_jobs_of_one_user_do_not_delay_another_users_first_job(
    processes: Processes, isolated_stores: dict[str, str], http: aiohttp.ClientSession, full: bool
) -> None:
    variables = environment_of(isolated_stores) | {"JOBS_PER_USER": "2", "WORKER_CONCURRENCY": "4"}
    server = processes.server(**variables)
    ada, bob = [await Actor(http, server.base, name).register() for name in ("Ada", "Bob")]
    sleeper = program_job(SLEEP_PROGRAM.format(seconds=5 if full else 600), timeoutSeconds=60)
    for _ in range(200 if full else 40):
        await asyncio.gather(*(submit_job(ada, sleeper) for _ in range(5)))
    processes.worker(**variables).ready()
    stats = await eventually_active(ada, 2)
    assert stats["queue"]["active"] == 2  # never more, although the worker has free capacity
    done = await bob.finished_job((await submit_job(bob))["id"])
    assert done["status"] == "completed"
    waited = datetime.fromisoformat(done["startedAt"]) - datetime.fromisoformat(done["createdAt"])
    assert waited < timedelta(seconds=2) or not full  # only on an otherwise idle machine


async def eventually_active(actor: Actor, number: int) -> dict:
    async with asyncio.timeout(WAIT_TIMEOUT_SECONDS):
        while (stats := await actor.get("/jobs/stats"))["queue"]["active"] < number:
            await asyncio.sleep(0.05)
    await asyncio.sleep(0.5)
    return (await actor.get("/jobs/stats")).body | {"first": stats.body}


async def test_two_servers_together_respect_the_slots_of_a_user(
    processes: Processes, isolated_stores: dict[str, str], http: aiohttp.ClientSession
) -> None:
    variables = environment_of(isolated_stores) | {"JOBS_PER_USER": "3"}
    servers = [processes.server(**variables) for _ in range(2)]
    ada = await Actor(http, servers[0].base, "Ada").register()
    actors = [ada.at(server.base) for server in servers]
    sleeper = program_job("import time\ntime.sleep(1)")
    jobs = await asyncio.gather(*(submit_job(actors[n % 2], sleeper) for n in range(12)))
    for _ in range(2):
        processes.worker(**variables)
    most = 0
    async with asyncio.timeout(60):
        while (stats := (await ada.get("/jobs/stats")).body)["user"]["completed"] < len(jobs):
            most = max(most, stats["queue"]["active"])
            await asyncio.sleep(0.02)
    assert most == 3


async def test_waiting_job_with_the_highest_priority_runs_first(
    processes: Processes, isolated_stores: dict[str, str], http: aiohttp.ClientSession
) -> None:
    variables = environment_of(isolated_stores) | {"JOBS_PER_USER": "1"}
    server = processes.server(**variables)
    ada = await Actor(http, server.base, "Ada").register()
    await submit_job(ada)  # takes the only slot
    jobs = {priority: (await submit_job(ada, priority=priority))["id"] for priority in (2, 9, 5)}
    processes.worker(**variables).ready()
    done = {priority: await ada.finished_job(job) for priority, job in jobs.items()}
    assert sorted(done, key=lambda priority: done[priority]["startedAt"]) == [9, 5, 2]
