"""What an operator may rely on in a worker process."""

import asyncio
import time

import aiohttp

from tests.actors import Actor
from tests.conftest import environment
from tests.devstack.pids import children_of, gone
from tests.jobs.asking import SLEEPS, ask, program
from tests.processes import Processes


async def test_an_idle_worker_ends_within_2_s_of_sigterm(processes: Processes, quiet: dict[str, str]) -> None:
    worker = processes.worker(**environment(quiet)).ready()
    began = time.monotonic()
    assert await asyncio.to_thread(worker.terminate) == 0
    assert time.monotonic() - began < 2


async def test_a_busy_worker_lets_its_job_finish(
    processes: Processes,
    quiet: dict[str, str],
    http: aiohttp.ClientSession,
) -> None:
    where = environment(quiet)
    worker, server = processes.worker(**where), processes.server(**where)
    ada = await Actor(http, server.base, "Ada").register()
    worker.ready()
    job = (await ask(ada, program(SLEEPS.format(seconds=2))))["id"]
    await started(ada, job)
    children = list(children_of(worker.pid).values())
    assert await asyncio.to_thread(worker.terminate) == 0
    assert gone(children, seconds=2)
    done = await ada.get(f"/jobs/{job}")
    assert (done["status"], done["attempts"], done["result"]["stdout"]) == ("completed", 1, "done\n")


async def started(who: Actor, job: str) -> None:
    async with asyncio.timeout(20):
        while (await who.get(f"/jobs/{job}"))["status"] != "processing":
            await asyncio.sleep(0.02)
