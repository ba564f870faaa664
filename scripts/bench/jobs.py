#!/usr/bin/env python3
"""Measure jobs: POST rate, jobs/s through one worker process, idle pick-up, sandboxed programs; beside bare SAQ.

Usage: python scripts/bench/jobs.py [--jobs N]

Starts its own stores, a server and a worker that also knows a type NOOP. What the embedded MongoDB stand-in can do at
most is measured too: the same writes, without anything around them.
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
from server.jobs import collections, store  # noqa: E402
from server.jobs.queue import CLASSES  # noqa: E402
from server.jobs.table import JobType  # noqa: E402
from server.jobs.types import JOB_TYPES  # noqa: E402
from tests.actors import Actor  # noqa: E402
from tests.conftest import TEST_SETTINGS  # noqa: E402

USERS = 20
AT_ONCE = 20
NOOP = {"type": "NOOP", "payload": {}}
HELLO = {"type": "CODE_EXECUTION", "payload": {"language": "python", "code": "print('hello')"}}


async def noop(*_: Any) -> dict[str, Any]:
    return {}


def know_noop() -> None:
    """Before the schemas look at the types."""
    JOB_TYPES["NOOP"] = JobType("NOOP", Schema(), noop, 60, lambda _: None, "Nothing.")
    from server.jobs.schemas import NewJob

    for validator in NewJob._declared_fields["type"].validators:
        validator.choices = sorted(JOB_TYPES)  # type: ignore[attr-defined]


async def bare(_: Any) -> None:
    return None


async def drain_bare(url: str, jobs: int, concurrency: int) -> None:
    """SAQ as it comes: prints the jobs/s of one worker process."""
    queue = RedisQueue(Redis.from_url(url), name=f"bare-{concurrency}")
    began = time.perf_counter()
    for start in range(0, jobs, 50):
        await asyncio.gather(*(queue.enqueue("bare") for _ in range(start, min(jobs, start + 50))))
    enqueued = time.perf_counter()
    running = Worker(queue, [bare], concurrency=concurrency, burst=True, dequeue_timeout=0.1)
    await running.start()
    seconds = time.perf_counter() - enqueued - 0.1
    print(f"{jobs / (enqueued - began):.0f} {jobs / seconds:.0f}")


def role(name: str, *arguments: str) -> list[str]:
    return [sys.executable, __file__, "--role", name, *arguments]


@contextlib.contextmanager
def process(name: str, environment: dict[str, str]) -> Iterator[None]:
    """One of our own, once it says that it is ready."""
    with tempfile.NamedTemporaryFile(prefix="bench-") as log:
        started = subprocess.Popen(role(name), env={**os.environ, **environment}, stdout=log, cwd="/")
        try:
            while b" ready" not in Path(log.name).read_bytes():
                assert started.poll() is None, f"the {name} ended"
                time.sleep(0.02)
            yield
        finally:
            started.terminate()
            started.wait()


def address(stack: Stack) -> dict[str, str]:
    """Records and queues of their own on these stores."""
    mongo = stack.mongo.url.replace("/workspace?", f"/bench_{uuid4().hex[:8]}?")
    return TEST_SETTINGS | stack.environment | {"MONGODB_URI": mongo, "LOG_LEVEL": "info", "LOG_FORMAT": "json"}


async def each_at_once(count: int, do: Callable[[int], Awaitable[Any]]) -> float:
    """Calls per second, so many at a time."""
    numbers = iter(range(count))

    async def one_after_another() -> None:
        for number in numbers:
            await do(number)

    began = time.perf_counter()
    await asyncio.gather(*(one_after_another() for _ in range(AT_ONCE)))
    return count / (time.perf_counter() - began)


@contextlib.asynccontextmanager
async def people(port: str) -> AsyncIterator[list[Actor]]:
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as http:
        base = f"http://127.0.0.1:{port}"
        yield [await Actor(http, base, f"User{number}").register() for number in range(USERS)]


async def drained(jobs: Any, count: int) -> float:
    """Jobs per second, from the first that was begun to the last that ended."""
    while jobs.count_documents({"status": "completed"}) < count:
        await asyncio.sleep(0.2)
    times = list(jobs.find({}, {"startedAt": 1, "completedAt": 1}))
    first, last = min(each["startedAt"] for each in times), max(each["completedAt"] for each in times)
    return count / (last - first).total_seconds()


async def measure_rates(stack: Stack, count: int, concurrency: int, body: dict[str, Any]) -> tuple[float, float]:
    """Posts per second while no worker runs, then jobs per second through one."""
    where = address(stack) | {"PORT": str(free_port()), "JOBS_PER_USER": "999", "WORKER_CONCURRENCY": str(concurrency)}
    with process("server", where):
        async with people(where["PORT"]) as users:
            posted = await each_at_once(count, lambda n: users[n % USERS].post("/jobs", body))
            with pymongo.MongoClient[dict[str, Any]](where["MONGODB_URI"]) as client, process("worker", where):
                return posted, await drained(client.get_default_database()["jobs"], count)


async def measure_pick_up(stack: Stack, count: int) -> list[float]:
    """Milliseconds from a record's creation to its beginning, with nothing else to do."""
    where = address(stack) | {"PORT": str(free_port())}
    waited = []
    with process("server", where), process("worker", where):
        async with people(where["PORT"]) as users:
            await asyncio.sleep(1)
            for _ in range(count):
                job = (await users[0].post("/jobs", NOOP))["job"]["id"]
                while (read := await users[0].get(f"/jobs/{job}"))["status"] != "completed":
                    await asyncio.sleep(0.005)
                begun, made = (datetime.fromisoformat(read[key]) for key in ("startedAt", "createdAt"))
                waited.append((begun - made).total_seconds() * 1000)
                await asyncio.sleep(0.02)
    return sorted(waited)


async def measure_store(stack: Stack, count: int) -> tuple[float, float]:
    """The same writes and reads without anything around them: creates/s and attempts/s."""
    mongo = resources.mongo_client(address(stack)["MONGODB_URI"]).get_default_database()
    await collections.prepare(mongo)
    made: list[store.Job] = []

    async def create(_: int) -> None:
        more = {"user": uuid4(), "user_name": "", "type": "NOOP", "payload": {}, "priority": 5, "slots": 1}
        empty = {"project": None, "workspace": None, "run_at": None, "idempotency_key": None, "trace": None}
        job, _ = await store.create(mongo, **more, **empty, body_hash="", now=store.moment())
        made.append(job)

    async def attempt(number: int) -> None:
        now = store.moment()
        job = await store.claim(mongo, job=made[number]["_id"], claim=1, worker="bench", now=now)
        assert job
        await store.complete(mongo, job=job, result={}, now=now)
        await store.waiting(mongo, user=job["userId"], types=["NOOP"], most=1, now=now)

    return await each_at_once(count, create), await each_at_once(count, attempt)


def free_port() -> int:
    from server.devstack.stack import free_port as find

    return find()


async def measure(stack: Stack, count: int) -> None:
    created, attempts = await measure_store(stack, count)
    print(f"MongoDB stand-in alone      {created:6.0f} creates/s  {attempts:6.0f} attempts/s")
    for concurrency in (10, 50):
        command = role("bare", stack.valkey.url, str(count), str(concurrency))
        done = await asyncio.to_thread(subprocess.run, command, capture_output=True, text=True, check=True)
        told = done.stdout.split()
        print(f"bare SAQ, concurrency {concurrency:2}     {told[0]:>6} enqueues/s {told[1]:>6} jobs/s")
        posted, ran = await measure_rates(stack, count, concurrency, NOOP)
        share, limit = 100 * ran / float(told[1]), 100 * ran / attempts
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
        uvloop.run(drain_bare(url, int(jobs), int(concurrency)))
    elif arguments.role:
        know_noop()
        loaded = settings.load()
        logs.configure(loaded)
        app.run(loaded) if arguments.role == "server" else worker.run(loaded, CLASSES)
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
