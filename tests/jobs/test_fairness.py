"""Who asks for much does not keep others waiting."""

import asyncio
from datetime import datetime, timedelta

import aiohttp

from tests.actors import Actor
from tests.conftest import environment
from tests.jobs.asking import SLEEPS, ask, program
from tests.patience import PATIENCE_SECONDS
from tests.processes import Processes


async def test_one_users_many_jobs_do_not_delay_anothers_first(
    processes: Processes, quiet: dict[str, str], http: aiohttp.ClientSession, full: bool
) -> None:
    where = environment(quiet) | {"JOBS_PER_USER": "2", "WORKER_CONCURRENCY": "4"}
    server = processes.server(**where)
    ada, bob = [await Actor(http, server.base, name).register() for name in ("Ada", "Bob")]
    sleeper = program(SLEEPS.format(seconds=5 if full else 600), timeoutSeconds=60)
    for _ in range(200 if full else 40):
        await asyncio.gather(*(ask(ada, sleeper) for _ in range(5)))
    processes.worker(**where).ready()
    stats = await eventually_active(ada, 2)
    assert stats["queue"]["active"] == 2  # never more, though the worker has room
    done = await bob.finished_job((await ask(bob))["id"])
    assert done["status"] == "completed"
    waited = datetime.fromisoformat(done["startedAt"]) - datetime.fromisoformat(done["createdAt"])
    assert waited < timedelta(seconds=2) or not full  # on a machine of one's own


async def eventually_active(who: Actor, number: int) -> dict:
    async with asyncio.timeout(PATIENCE_SECONDS):
        while (stats := await who.get("/jobs/stats"))["queue"]["active"] < number:
            await asyncio.sleep(0.05)
    await asyncio.sleep(0.5)
    return (await who.get("/jobs/stats")).body | {"first": stats.body}


async def test_two_servers_together_do_not_give_a_user_more_than_the_share(
    processes: Processes, quiet: dict[str, str], http: aiohttp.ClientSession
) -> None:
    where = environment(quiet) | {"JOBS_PER_USER": "3"}
    servers = [processes.server(**where) for _ in range(2)]
    ada = await Actor(http, servers[0].base, "Ada").register()
    doors = [ada.at(server.base) for server in servers]
    sleeper = program("import time\ntime.sleep(1)")
    jobs = await asyncio.gather(*(ask(doors[n % 2], sleeper) for n in range(12)))
    for _ in range(2):
        processes.worker(**where)
    most = 0
    async with asyncio.timeout(60):
        while (stats := (await ada.get("/jobs/stats")).body)["user"]["completed"] < len(jobs):
            most = max(most, stats["queue"]["active"])
            await asyncio.sleep(0.02)
    assert most == 3


async def test_of_a_users_waiting_jobs_the_most_urgent_goes_first(
    processes: Processes, quiet: dict[str, str], http: aiohttp.ClientSession
) -> None:
    where = environment(quiet) | {"JOBS_PER_USER": "1"}
    server = processes.server(**where)
    ada = await Actor(http, server.base, "Ada").register()
    await ask(ada)  # takes the only slot
    made = {priority: (await ask(ada, priority=priority))["id"] for priority in (2, 9, 5)}
    processes.worker(**where).ready()
    done = {priority: await ada.finished_job(job) for priority, job in made.items()}
    assert sorted(done, key=lambda priority: done[priority]["startedAt"]) == [9, 5, 2]
