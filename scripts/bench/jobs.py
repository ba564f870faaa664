#!/usr/bin/env python3
"""Measure jobs: POST rate, jobs/s of one worker process, idle pick-up, sandboxed programs, compared with bare SAQ.

Usage: python scripts/bench/jobs.py [--jobs N]

Starts its own stores, a server and a worker with an additional job type NOOP. It also measures the maximum of the
embedded MongoDB stand-in: the same writes without any other work.
"""

import argparse
import asyncio
import contextlib
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from datetime import datetime
from pathlib import Path
from typing import Any
from uuid import uuid4

import aiohttp
import pymongo
import uvloop
from marshmallow import Schema
from redis.asyncio import Redis
from saq import Worker
from saq.queue.redis import RedisQueue

ROOT = Path(__file__).parent.parent.parent
sys.path.insert(0, str(ROOT))

from server import app, logs, migrations, resources, settings, worker  # noqa: E402
from server.devstack.stack import Stack  # noqa: E402
from server.jobs import indexes, store  # noqa: E402
from server.jobs.queue import PRIORITY_CLASSES  # noqa: E402
from server.jobs.table import JobType  # noqa: E402
from server.jobs.types import JOB_TYPES  # noqa: E402
from tests.actors import Actor  # noqa: E402
from tests.conftest import TEST_SETTINGS  # noqa: E402

USERS = 20
CONCURRENCY = 20
NOOP = {"type": "NOOP", "payload": {}}
HELLO = {"type": "CODE_EXECUTION", "payload": {"language": "python", "code": "print('hello')"}}


async def noop(*_: Any) -> dict[str, Any]:
    return {}


def register_noop() -> None:
    """Register the job type NOOP and add it to the schema of new jobs."""
    JOB_TYPES["NOOP"] = JobType("NOOP", Schema(), noop, 60, lambda _: None, "Nothing.")
    from server.jobs.schemas import NewJob

    for validator in NewJob._declared_fields["type"].validators:
        validator.choices = sorted(JOB_TYPES)  # type: ignore[attr-defined]


async def noop_task(_: Any) -> None:
    return None


async def measure_bare_saq(url: str, jobs: int, concurrency: int) -> None:
    """Measure one worker process of unmodified SAQ, and print enqueues/s and jobs/s."""
    queue = RedisQueue(Redis.from_url(url), name=f"bare-{concurrency}")
    started = time.perf_counter()
    for start in range(0, jobs, 50):
        await asyncio.gather(*(queue.enqueue("bare") for _ in range(start, min(jobs, start + 50))))
    enqueued = time.perf_counter()
    saq_worker = Worker(queue, [noop_task], concurrency=concurrency, burst=True, dequeue_timeout=0.1)
    await saq_worker.start()
    seconds = time.perf_counter() - enqueued - 0.1
    print(f"{jobs / (enqueued - started):.0f} {jobs / seconds:.0f}")


def role_command(name: str, *arguments: str) -> list[str]:
    return [sys.executable, __file__, "--role", name, *arguments]


@contextlib.contextmanager
def started_process(name: str, environment: dict[str, str]) -> Iterator[None]:
    """Start a process of this script, wait until it logs that it is ready, and stop it at the end."""
    with tempfile.NamedTemporaryFile(prefix="bench-") as log:
        running = subprocess.Popen(role_command(name), env={**os.environ, **environment}, stdout=log, cwd="/")
        try:
            while b" ready" not in Path(log.name).read_bytes():
                assert running.poll() is None, f"the {name} exited"
                time.sleep(0.02)
            yield
        finally:
            running.terminate()
            running.wait()


def store_settings(stack: Stack) -> dict[str, str]:
    """Return settings for these stores with a MongoDB database that no other measurement uses."""
    mongo = stack.mongo.url.replace("/workspace?", f"/bench_{uuid4().hex[:8]}?")
    return TEST_SETTINGS | stack.environment | {"MONGODB_URI": mongo, "LOG_LEVEL": "info", "LOG_FORMAT": "json"}


async def run_concurrently(count: int, do: Callable[[int], Awaitable[Any]]) -> float:
    """Make ``count`` calls, ``CONCURRENCY`` at a time, and return the calls per second."""
    numbers = iter(range(count))

    async def call_in_sequence() -> None:
        for number in numbers:
            await do(number)

    started = time.perf_counter()
    await asyncio.gather(*(call_in_sequence() for _ in range(CONCURRENCY)))
    return count / (time.perf_counter() - started)


@contextlib.asynccontextmanager
async def registered_users(port: str) -> AsyncIterator[list[Actor]]:
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as http:
        base = f"http://127.0.0.1:{port}"
        yield [await Actor(http, base, f"User{number}").register() for number in range(USERS)]


async def measure_drain(jobs: Any, count: int) -> float:
    """Return the jobs per second, from the start of the first job to the end of the last one."""
    while jobs.count_documents({"status": "completed"}) < count:
        await asyncio.sleep(0.2)
    records = list(jobs.find({}, {"startedAt": 1, "completedAt": 1}))
    first, last = min(record["startedAt"] for record in records), max(record["completedAt"] for record in records)
    return count / (last - first).total_seconds()


async def measure_rates(stack: Stack, count: int, concurrency: int, body: dict[str, Any]) -> tuple[float, float]:
    """Return the posts per second while no worker runs, then the jobs per second of one worker."""
    environment = store_settings(stack) | {
        "PORT": str(free_port()),
        "JOBS_PER_USER": "999",
        "WORKER_CONCURRENCY": str(concurrency),
    }
    with started_process("server", environment):
        async with registered_users(environment["PORT"]) as users:
            posts_per_second = await run_concurrently(count, lambda n: users[n % USERS].post("/jobs", body))
            with (
                pymongo.MongoClient[dict[str, Any]](environment["MONGODB_URI"]) as client,
                started_process("worker", environment),
            ):
                return posts_per_second, await measure_drain(client.get_default_database()["jobs"], count)


async def measure_pick_up(stack: Stack, count: int) -> list[float]:
    """Return the sorted milliseconds from the creation of a job to its start, on idle processes."""
    environment = store_settings(stack) | {"PORT": str(free_port())}
    waited = []
    with started_process("server", environment), started_process("worker", environment):
        async with registered_users(environment["PORT"]) as users:
            await asyncio.sleep(1)
            for _ in range(count):
                job = (await users[0].post("/jobs", NOOP))["job"]["id"]
                while (job_record := await users[0].get(f"/jobs/{job}"))["status"] != "completed":
                    await asyncio.sleep(0.005)
                started, created = (datetime.fromisoformat(job_record[key]) for key in ("startedAt", "createdAt"))
                waited.append((started - created).total_seconds() * 1000)
                await asyncio.sleep(0.02)
    return sorted(waited)


async def measure_store(stack: Stack, count: int) -> tuple[float, float]:
    """Return creates/s and attempts/s of the store: the writes and reads of jobs without any other work."""
    mongo = resources.mongo_client(store_settings(stack)["MONGODB_URI"]).get_default_database()
    await indexes.create_all(mongo)
    jobs: list[store.JobRecord] = []

    async def create(_: int) -> None:
        fields = {"user": uuid4(), "user_name": "", "type": "NOOP", "payload": {}, "priority": 5, "slots": 1}
        defaults = {"project": None, "workspace": None, "run_at": None, "idempotency_key": None, "trace": None}
        job, _ = await store.create(mongo, **fields, **defaults, body_hash="", now=store.mongo_now())
        jobs.append(job)

    async def attempt(number: int) -> None:
        now = store.mongo_now()
        job = await store.claim(mongo, job=jobs[number]["_id"], claim=1, worker="bench", now=now)
        assert job
        await store.complete(mongo, job=job, result={}, now=now)
        await store.list_waiting(mongo, user=job["userId"], types=["NOOP"], limit=1, now=now)

    return await run_concurrently(count, create), await run_concurrently(count, attempt)


def free_port() -> int:
    from server.devstack.stack import free_port as find

    return find()


async def measure(stack: Stack, count: int) -> None:
    created, attempts = await measure_store(stack, count)
    print(f"MongoDB stand-in alone      {created:6.0f} creates/s  {attempts:6.0f} attempts/s")
    for concurrency in (10, 50):
        command = role_command("bare", stack.valkey.url, str(count), str(concurrency))
        completed = await asyncio.to_thread(subprocess.run, command, capture_output=True, text=True, check=True)
        rates = completed.stdout.split()
        print(f"bare SAQ, concurrency {concurrency:2}     {rates[0]:>6} enqueues/s {rates[1]:>6} jobs/s")
        posted, ran = await measure_rates(stack, count, concurrency, NOOP)
        share, limit = 100 * ran / float(rates[1]), 100 * ran / attempts
        print(
            f"ours, concurrency {concurrency:2}         {posted:6.0f} posts/s    {ran:6.0f} jobs/s: "
            f"{share:.0f} % of bare SAQ, {limit:.0f} % of what the store can"
        )
    waited = await measure_pick_up(stack, 100)
    print(f"idle pick-up                p50 {statistics.median(waited):.1f} ms, p99 {waited[98]:.1f} ms")
    _, ran = await measure_rates(stack, max(40, count // 20), 4, HELLO)
    print(f"sandboxed hello, 4 at once  {ran:6.1f} jobs/s")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--jobs", type=int, default=2000)
    parser.add_argument("--role", choices=("bare", "server", "worker"), help=argparse.SUPPRESS)
    parser.add_argument("rest", nargs="*", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.role == "bare":
        url, jobs, concurrency = arguments.rest
        uvloop.run(measure_bare_saq(url, int(jobs), int(concurrency)))
    elif arguments.role:
        register_noop()
        loaded = settings.load()
        logs.configure(loaded)
        app.run(loaded) if arguments.role == "server" else worker.run(loaded, PRIORITY_CLASSES)
    else:
        with (
            tempfile.TemporaryDirectory(prefix="bench-", ignore_cleanup_errors=True) as folder,
            Stack(Path(folder) / "data") as stack,
        ):
            migrations.apply(stack.postgres.url)
            uvloop.run(measure(stack, arguments.jobs))
            stack.mongo.kill()


if __name__ == "__main__":
    main()
