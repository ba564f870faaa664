"""Queues by class: the highest first, none starves, and each worker takes what it is for."""

import asyncio

import aiohttp
import pytest
from redis.asyncio import Redis

from server.jobs import lifecycle, queue
from server.jobs.bell import Bell
from server.jobs.queue import InOrder, class_of, in_turn
from server.jobs.types import JOB_TYPES
from tests.actors import Actor
from tests.conftest import environment
from tests.jobs.asking import ask
from tests.processes import Processes


@pytest.mark.parametrize(
    ("priority", "name"),
    [(10, "high"), (8, "high"), (7, "normal"), (5, "normal"), (4, "normal"), (3, "low"), (1, "low")],
)
def test_the_class_of_a_priority(priority: int, name: str) -> None:
    assert class_of(priority) == name


def test_the_highest_class_comes_first_but_none_starves() -> None:
    lanes = ["high", "normal", "low"]
    firsts = [next(iter(in_turn(lanes, taken))) for taken in range(100)]  # type: ignore[arg-type]
    assert {name: firsts.count(name) for name in lanes} == {"high": 80, "normal": 10, "low": 10}
    assert [list(in_turn(lanes, 0)), list(in_turn(lanes, 9))] == [lanes, ["low", "high", "normal"]]  # type: ignore[arg-type]
    assert list(in_turn(["low"], 4)) == ["low"]  # type: ignore[arg-type]


@pytest.fixture
async def redis(quiet: dict[str, str]):
    async with Redis.from_url(quiet["redis_url"]) as client:
        await client.flushdb()
        yield client


async def send(redis: Redis, number: int, language: str, type: str = "CODE_EXECUTION") -> None:
    job = {"_id": f"job-{number}", "claim": 0, "priority": 5, "payload": {"language": language}}
    message = queue.message(job, JOB_TYPES["CODE_EXECUTION"])
    message.kwargs["type"] = type
    await queue.lanes(redis)["normal"].enqueue(message)


async def taken(redis: Redis, *has: str) -> list[str]:
    """What such a worker takes at once, one message after the other."""
    messages = InOrder(redis, list(queue.lanes(redis).values()), Bell(redis, on_cancel=print), has=has)
    jobs = []
    while message := await messages._next():
        jobs.append(message.kwargs["job"])
    return jobs


async def test_what_a_worker_cannot_run_keeps_its_place_and_holds_up_nobody(redis: Redis) -> None:
    for number in range(45):
        await send(redis, number, "python" if number in (20, 43) else "javascript")
    assert await taken(redis, "CODE_EXECUTION", "python", "bash") == ["job-20", "job-43"]
    await send(redis, 50, "python")
    assert await taken(redis, "CODE_EXECUTION", "python", "bash") == ["job-50"]
    others = [f"job-{number}" for number in range(45) if number not in (20, 43)]
    assert await taken(redis, "CODE_EXECUTION", "javascript") == others


async def test_a_type_that_only_newer_workers_know_is_left_to_them(redis: Redis) -> None:
    await send(redis, 1, "python", type="NEWER")
    await send(redis, 2, "python")
    assert await taken(redis, "CODE_EXECUTION", "python") == ["job-2"]
    assert await taken(redis, "CODE_EXECUTION", "NEWER", "python") == ["job-1"]


async def test_a_message_whose_text_is_lost_is_forgotten(redis: Redis) -> None:
    await send(redis, 1, "python")
    await send(redis, 2, "python")
    await redis.delete("saq:job:{jobs.normal}:{jobs.normal}:job-1:1")
    assert await taken(redis, "CODE_EXECUTION", "python") == []
    assert await taken(redis, "CODE_EXECUTION", "python") == ["job-2"]


def test_saqs_deadline_comes_after_all_patience_with_mongodb() -> None:
    assert queue.MARGIN_SECONDS > 3 * lifecycle.PATIENCE_SECONDS  # for the claim, the output and the outcome


async def test_urgent_jobs_overtake(processes: Processes, quiet: dict[str, str], http: aiohttp.ClientSession) -> None:
    where = environment(quiet) | {"JOBS_PER_USER": "100", "WORKER_CONCURRENCY": "1"}
    server = processes.server(**where)
    ada = await Actor(http, server.base, "Ada").register()
    late = [(await ask(ada, priority=1))["id"] for _ in range(6)]
    urgent = [(await ask(ada, priority=10))["id"] for _ in range(6)]
    processes.worker(**where).ready()
    started = {job: (await ada.finished_job(job))["startedAt"] for job in late + urgent}
    assert sorted(started, key=started.__getitem__) == urgent + late


async def test_a_worker_takes_only_from_the_queues_that_it_is_for(
    processes: Processes, quiet: dict[str, str], http: aiohttp.ClientSession
) -> None:
    where = environment(quiet)
    server = processes.server(**where)
    ada = await Actor(http, server.base, "Ada").register()
    processes.worker("--queues", "high,low", **where).ready()
    normal, low = (await ask(ada))["id"], (await ask(ada, priority=1))["id"]
    assert (await ada.finished_job(low))["status"] == "completed"
    await asyncio.sleep(0.5)
    assert (await ada.get(f"/jobs/{normal}"))["status"] == "pending"
    processes.worker("--queues", "normal", **where).ready()
    assert (await ada.finished_job(normal))["status"] == "completed"


def test_an_unknown_queue_is_named(processes: Processes) -> None:
    refused = processes.worker("--queues", "urgent")
    assert refused.wait() == 2
    assert "choose from high, normal, low" in refused.output
