"""Recovery: every acknowledged job reaches a final state with one stored outcome, whichever process is killed."""

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
from tests.conftest import TEST_SETTINGS, environment_of
from tests.devstack.pids import all_exited, children_of
from tests.jobs.requests import SLEEP_PROGRAM, program_job, submit_job
from tests.processes import Processes
from tests.timeouts import WAIT_TIMEOUT_SECONDS

FINAL = {"completed", "failed", "cancelled"}
SHORT_LEASE = "server.jobs.store.LEASE_DURATION = server.jobs.store.timedelta(seconds=5)"
LOST_SECONDS = 60  # for the lease to expire and the job to run again


async def until_status(actor: Actor, job: str, *statuses: str, seconds: float = LOST_SECONDS) -> dict[str, Any]:
    async with asyncio.timeout(seconds):
        while (read := await actor.get(f"/jobs/{job}"))["status"] not in statuses:
            await asyncio.sleep(0.1)
    return read.body


async def test_job_of_a_killed_worker_runs_again_without_counting_the_lost_attempt(
    processes: Processes, isolated_stores: dict[str, str], http: aiohttp.ClientSession
) -> None:
    variables = environment_of(isolated_stores)
    server, first = processes.server(**variables), processes.worker(**variables).ready()
    ada = await Actor(http, server.base, "Ada").register()
    job = (await submit_job(ada, program_job(SLEEP_PROGRAM.format(seconds=5))))["id"]
    await until_status(ada, job, "processing")
    children = list(children_of(first.pid).values())
    first.kill()
    assert all_exited(children, seconds=WAIT_TIMEOUT_SECONDS)  # the program ends with its worker
    second = processes.worker(**variables).ready()
    done = await until_status(ada, job, *FINAL)
    assert (done["status"], done["attempts"], done["result"]["stdout"]) == ("completed", 1, "done\n")
    assert [attempt["error"] and attempt["error"]["code"] for attempt in done["history"]] == ["worker_lost", None]
    assert second.terminate() == 0


async def test_resumed_worker_cannot_overwrite_its_successors_outcome(
    processes: Processes, isolated_stores: dict[str, str], http: aiohttp.ClientSession
) -> None:
    variables = environment_of(isolated_stores)
    server, first = processes.server(**variables), processes.worker(**variables, override=SHORT_LEASE).ready()
    ada = await Actor(http, server.base, "Ada").register()
    job = (await submit_job(ada, program_job("import os, time\ntime.sleep(5)\nprint(os.urandom(8).hex())")))["id"]
    await until_status(ada, job, "processing")
    first.freeze()
    processes.worker(**variables, override=SHORT_LEASE).ready()
    done = await until_status(ada, job, *FINAL)
    first.unfreeze()
    await asyncio.sleep(3)  # time to detect the loss, and to write if the fence failed
    assert (await ada.get(f"/jobs/{job}")).body == done
    assert len(done["history"]) == 2


async def test_queued_jobs_run_after_redis_was_emptied(
    processes: Processes, isolated_stores: dict[str, str], http: aiohttp.ClientSession
) -> None:
    variables = environment_of(isolated_stores)
    server = processes.server(**variables)
    ada = await Actor(http, server.base, "Ada").register()
    jobs = [(await submit_job(ada))["id"] for _ in range(6)]
    redis.Redis.from_url(isolated_stores["redis_url"]).flushdb()
    processes.worker(**variables).ready()
    for job in jobs:
        assert (await until_status(ada, job, *FINAL))["status"] == "completed"


async def test_job_fails_after_too_many_lost_workers(
    processes: Processes, isolated_stores: dict[str, str], http: aiohttp.ClientSession, full: bool
) -> None:
    variables, losses = environment_of(isolated_stores), 5 if full else 1  # each takes until a lease expires
    override = "" if full else "server.jobs.store.MAX_LOST_WORKERS=1"
    server = processes.server(**variables)
    ada = await Actor(http, server.base, "Ada").register()
    job = (await submit_job(ada, program_job(SLEEP_PROGRAM.format(seconds=60), timeoutSeconds=60)))["id"]
    for _ in range(losses):
        worker = processes.worker(**variables).ready()
        await until_status(ada, job, "processing")
        worker.kill()
        # It reclaims the job, but does not take it from its queue.
        rescuer = processes.worker("--queues", "high", **variables, override=override).ready()
        await until_status(ada, job, "pending", "failed")
        rescuer.kill()
    done = await ada.get(f"/jobs/{job}")
    assert (done["status"], done["error"]["code"], done["attempts"]) == ("failed", "worker_lost", 0)
    assert [attempt["error"]["code"] for attempt in done["history"]] == ["worker_lost"] * losses


@pytest.fixture
def own_processes(own_stack: Stack, tmp_path: Path) -> Iterator[Processes]:
    with Processes(TEST_SETTINGS | own_stack.environment | {"JOBS_PER_USER": "8"}, tmp_path) as running:
        yield running


class Cluster:
    """Two servers, two workers and the stores, which can be killed and restarted (not a Redis Cluster)."""

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
    def faults(self) -> list[Callable[[], None]]:
        return [self.kill_worker, self.kill_server, self.empty_and_kill_valkey, self.kill_mongo]


async def test_every_job_gets_exactly_one_outcome_while_processes_and_stores_are_killed(
    own_stack: Stack, own_processes: Processes, http: aiohttp.ClientSession, full: bool
) -> None:
    cluster = Cluster(own_stack, own_processes)
    actors = [await Actor(http, cluster.servers[0].base, name).register() for name in ("Ada", "Bob", "Eve", "Kay")]
    jobs: dict[str, Actor] = {}
    posting = asyncio.ensure_future(post_many(actors, cluster, jobs, 500 if full else 60))
    for inject_fault in random.sample(cluster.faults, 4) * (3 if full else 1):
        await asyncio.sleep(random.uniform(0.5, 2.0))
        inject_fault()  # in this thread, which owns the stores
    await posting
    statuses = Counter()
    async with asyncio.timeout(300 if full else 120):
        for job, actor in jobs.items():
            done = await wait_until_ended(actor, cluster, job)
            statuses[done["status"]] += 1
            successful = [attempt for attempt in done["history"] if attempt["error"] is None]
            assert (len(successful), done["result"]["stdout"]) == (1, job_words(done)), done
    assert statuses == {"completed": len(jobs)}


def job_words(job: dict[str, Any]) -> str:
    return job["payload"]["args"][0] + "\n"


async def post_many(actors: list[Actor], cluster: Cluster, jobs: dict[str, Actor], count: int) -> None:
    """Post each job until it is acknowledged; its idempotency key prevents duplicates."""
    for number in range(count):
        actor, key = actors[number % len(actors)], f"job-{number}"
        body = program_job("import sys, time\ntime.sleep(0.2)\nprint(sys.argv[1])", args=[key])
        answer = await call_until_acknowledged(actor, cluster, "POST", "/jobs", body, headers={"Idempotency-Key": key})
        jobs[answer["job"]["id"]] = actor
        await asyncio.sleep(0.02)


async def wait_until_ended(actor: Actor, cluster: Cluster, job: str) -> dict[str, Any]:
    while (read := await call_until_acknowledged(actor, cluster, "GET", f"/jobs/{job}"))["status"] not in FINAL:
        await asyncio.sleep(0.2)
    return read.body


async def call_until_acknowledged(
    actor: Actor, cluster: Cluster, method: str, path: str, body: Any = None, **options: Any
) -> Any:
    while True:
        try:
            answer = await actor.at(random.choice(cluster.servers).base).call(method, path, body, **options)
        except (aiohttp.ClientError, TimeoutError, OSError):
            answer = None
        if answer is not None and answer.status < 500:
            assert answer.status in (200, 201), answer
            return answer
        await asyncio.sleep(0.2)
