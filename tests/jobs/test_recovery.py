"""Nothing acknowledged is lost, whatever is killed: every job reaches a final state, with one stored outcome."""

import asyncio
import random
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import aiohttp
import pytest
import redis

from server.devstack.stack import Stack
from tests.actors import Actor
from tests.conftest import TEST_SETTINGS, environment
from tests.devstack.pids import children_of, gone
from tests.jobs.asking import SLEEPS, ask, program
from tests.patience import PATIENCE_SECONDS
from tests.processes import Processes

FINAL = {"completed", "failed", "cancelled"}
SHORT_LEASE = "server.jobs.store.LEASE = server.jobs.store.timedelta(seconds=5)"
LOST_SECONDS = 60  # for a lease to run out, and the job to run again


async def until_status(who: Actor, job: str, *statuses: str, seconds: float = LOST_SECONDS) -> dict[str, Any]:
    async with asyncio.timeout(seconds):
        while (read := await who.get(f"/jobs/{job}"))["status"] not in statuses:
            await asyncio.sleep(0.1)
    return read.body


async def test_a_killed_workers_job_is_run_by_another_and_the_lost_attempt_does_not_count(
    processes: Processes, quiet: dict[str, str], http: aiohttp.ClientSession
) -> None:
    where = environment(quiet)
    server, first = processes.server(**where), processes.worker(**where).ready()
    ada = await Actor(http, server.base, "Ada").register()
    job = (await ask(ada, program(SLEEPS.format(seconds=5))))["id"]
    await until_status(ada, job, "processing")
    left = list(children_of(first.pid).values())
    first.kill()
    assert gone(left, seconds=PATIENCE_SECONDS)  # not even the program outlives it
    second = processes.worker(**where).ready()
    done = await until_status(ada, job, *FINAL)
    assert (done["status"], done["attempts"], done["result"]["stdout"]) == ("completed", 1, "done\n")
    assert [each["error"] and each["error"]["code"] for each in done["history"]] == ["worker_lost", None]
    assert second.terminate() == 0


async def test_a_stopped_worker_that_comes_back_cannot_write_over_its_successor(
    processes: Processes, quiet: dict[str, str], http: aiohttp.ClientSession
) -> None:
    where = environment(quiet)
    server, first = processes.server(**where), processes.worker(**where, shorter=SHORT_LEASE).ready()
    ada = await Actor(http, server.base, "Ada").register()
    job = (await ask(ada, program("import os, time\ntime.sleep(5)\nprint(os.urandom(8).hex())")))["id"]
    await until_status(ada, job, "processing")
    first.freeze()
    processes.worker(**where, shorter=SHORT_LEASE).ready()
    done = await until_status(ada, job, *FINAL)
    first.thaw()
    await asyncio.sleep(3)  # time to notice, and to write if it could
    assert (await ada.get(f"/jobs/{job}")).body == done
    assert len(done["history"]) == 2


async def test_what_was_queued_when_redis_was_emptied_runs(
    processes: Processes, quiet: dict[str, str], http: aiohttp.ClientSession
) -> None:
    where = environment(quiet)
    server = processes.server(**where)
    ada = await Actor(http, server.base, "Ada").register()
    jobs = [(await ask(ada))["id"] for _ in range(6)]
    redis.Redis.from_url(quiet["redis_url"]).flushdb()
    processes.worker(**where).ready()
    for job in jobs:
        assert (await until_status(ada, job, *FINAL))["status"] == "completed"


async def test_a_job_whose_workers_are_lost_again_and_again_fails(
    processes: Processes, quiet: dict[str, str], http: aiohttp.ClientSession, full: bool
) -> None:
    where, losses = environment(quiet), 5 if full else 1  # each takes a lease that runs out
    patience = "" if full else "server.jobs.store.MOST_LOST=1"
    server = processes.server(**where)
    ada = await Actor(http, server.base, "Ada").register()
    job = (await ask(ada, program(SLEEPS.format(seconds=60), timeoutSeconds=60)))["id"]
    for _ in range(losses):
        worker = processes.worker(**where).ready()
        await until_status(ada, job, "processing")
        worker.kill()
        # It takes back, but runs nothing of it.
        rescuer = processes.worker("--queues", "high", **where, shorter=patience).ready()
        await until_status(ada, job, "pending", "failed")
        rescuer.kill()
    done = await ada.get(f"/jobs/{job}")
    assert (done["status"], done["error"]["code"], done["attempts"]) == ("failed", "worker_lost", 0)
    assert [each["error"]["code"] for each in done["history"]] == ["worker_lost"] * losses


@pytest.fixture
def own_processes(own_stack: Stack, tmp_path: Path) -> Iterator[Processes]:
    with Processes(TEST_SETTINGS | own_stack.environment | {"JOBS_PER_USER": "8"}, tmp_path) as running:
        yield running


class Town:
    """Two servers, two workers and the stores, all of which may be killed and come back."""

    def __init__(self, stack: Stack, processes: Processes) -> None:
        self.stack = stack
        self.processes = processes
        self.workers = [processes.worker().ready() for _ in range(2)]
        self.servers = [processes.server() for _ in range(2)]

    def kill_worker(self) -> None:
        self.workers.pop(0).kill()
        self.workers.append(self.processes.worker())

    def kill_server(self) -> None:
        self.servers.pop(0).kill()
        self.servers.append(self.processes.server())

    def empty_and_kill_valkey(self) -> None:
        redis.Redis.from_url(self.stack.valkey.url).flushall()
        self.stack.valkey.kill()
        self.stack.valkey.start()

    def kill_mongo(self) -> None:
        self.stack.mongo.kill()
        self.stack.mongo.start()

    @property
    def disasters(self) -> list[Callable[[], None]]:
        return [self.kill_worker, self.kill_server, self.empty_and_kill_valkey, self.kill_mongo]


async def test_under_load_whatever_is_killed_every_job_ends_with_exactly_one_outcome(
    own_stack: Stack, own_processes: Processes, http: aiohttp.ClientSession, full: bool
) -> None:
    town = Town(own_stack, own_processes)
    people = [await Actor(http, town.servers[0].base, name).register() for name in ("Ada", "Bob", "Eve", "Kay")]
    jobs: dict[str, Actor] = {}
    posting = asyncio.ensure_future(post_many(people, town, jobs, 500 if full else 60))
    for disaster in random.sample(town.disasters, 4) * (3 if full else 1):
        await asyncio.sleep(random.uniform(0.5, 2.0))
        disaster()  # in this thread: the stores belong to it
    await posting
    endings = Counter()
    async with asyncio.timeout(300 if full else 120):
        for job, who in jobs.items():
            done = await ended(who, town, job)
            endings[done["status"]] += 1
            stored = [each for each in done["history"] if each["error"] is None]
            assert (len(stored), done["result"]["stdout"]) == (1, job_words(done)), done
    assert endings == {"completed": len(jobs)}


def job_words(job: dict[str, Any]) -> str:
    return job["payload"]["args"][0] + "\n"


async def post_many(people: list[Actor], town: Town, jobs: dict[str, Actor], count: int) -> None:
    """Whatever the answer, each is posted until it is acknowledged; a key makes that one job."""
    for number in range(count):
        who, key = people[number % len(people)], f"job-{number}"
        body = program("import sys, time\ntime.sleep(0.2)\nprint(sys.argv[1])", args=[key])
        answer = await insistently(who, town, "POST", "/jobs", body, headers={"Idempotency-Key": key})
        jobs[answer["job"]["id"]] = who
        await asyncio.sleep(0.02)


async def ended(who: Actor, town: Town, job: str) -> dict[str, Any]:
    while (read := await insistently(who, town, "GET", f"/jobs/{job}"))["status"] not in FINAL:
        await asyncio.sleep(0.2)
    return read.body


async def insistently(who: Actor, town: Town, method: str, path: str, body: Any = None, **options: Any) -> Any:
    while True:
        try:
            answer = await who.at(random.choice(town.servers).base).call(method, path, body, **options)
        except (aiohttp.ClientError, TimeoutError, OSError):
            answer = None
        if answer is not None and answer.status < 500:
            assert answer.status in (200, 201), answer
            return answer
        await asyncio.sleep(0.2)
