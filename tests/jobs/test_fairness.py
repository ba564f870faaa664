"""Fair scheduling: a user with many jobs does not delay other users."""

import asyncio
from datetime import datetime, timedelta

import aiohttp

from tests.actors import Actor
from tests.conftest import environment
from tests.jobs.asking import SLEEPS, ask, program
from tests.patience import PATIENCE_SECONDS
from tests.processes import Processes


async def test_many_jobs_of_one_user_do_not_delay_another_users_first_job(
    processes: Processes, quiet: dict[str, str], http: aiohttp.ClientSession, full: bool
) -> None:
    variables = environment(quiet) | {"JOBS_PER_USER": "2", "WORKER_CONCURRENCY": "4"}
    server = processes.server(**variables)
    ada, bob = [await Actor(http, server.base, name).register() for name in ("Ada", "Bob")]
    sleeper = program(SLEEPS.format(seconds=5 if full else 600), timeoutSeconds=60)
    for _ in range(200 if full else 40):
        await asyncio.gather(*(ask(ada, sleeper) for _ in range(5)))
    processes.worker(**variables).ready()
    stats = await eventually_active(ada, 2)
    assert stats["queue"]["active"] == 2  # never more, although the worker has free capacity
    done = await bob.finished_job((await ask(bob))["id"])
    assert done["status"] == "completed"
    waited = datetime.fromisoformat(done["startedAt"]) - datetime.fromisoformat(done["createdAt"])
    assert waited < timedelta(seconds=2) or not full  # only on an otherwise idle machine


async def eventually_active(actor: Actor, number: int) -> dict:
    async with asyncio.timeout(PATIENCE_SECONDS):
        while (stats := await actor.get("/jobs/stats"))["queue"]["active"] < number:
            await asyncio.sleep(0.05)
    await asyncio.sleep(0.5)
    return (await actor.get("/jobs/stats")).body | {"first": stats.body}


async def test_two_servers_together_respect_the_slots_of_a_user(
    processes: Processes, quiet: dict[str, str], http: aiohttp.ClientSession
) -> None:
    variables = environment(quiet) | {"JOBS_PER_USER": "3"}
    servers = [processes.server(**variables) for _ in range(2)]
    ada = await Actor(http, servers[0].base, "Ada").register()
    actors = [ada.at(server.base) for server in servers]
    sleeper = program("import time\ntime.sleep(1)")
    jobs = await asyncio.gather(*(ask(actors[n % 2], sleeper) for n in range(12)))
    for _ in range(2):
        processes.worker(**variables)
    most = 0
    async with asyncio.timeout(60):
        while (stats := (await ada.get("/jobs/stats")).body)["user"]["completed"] < len(jobs):
            most = max(most, stats["queue"]["active"])
            await asyncio.sleep(0.02)
    assert most == 3


async def test_waiting_job_with_the_highest_priority_runs_first(
    processes: Processes, quiet: dict[str, str], http: aiohttp.ClientSession
) -> None:
    variables = environment(quiet) | {"JOBS_PER_USER": "1"}
    server = processes.server(**variables)
    ada = await Actor(http, server.base, "Ada").register()
    await ask(ada)  # takes the only slot
    jobs = {priority: (await ask(ada, priority=priority))["id"] for priority in (2, 9, 5)}
    processes.worker(**variables).ready()
    done = {priority: await ada.finished_job(job) for priority, job in jobs.items()}
    assert sorted(done, key=lambda priority: done[priority]["startedAt"]) == [9, 5, 2]
