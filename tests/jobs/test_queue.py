"""Queues by priority class: the highest first, none starves, and each worker takes what it supports."""

import asyncio

import aiohttp
import pytest
from redis.asyncio import Redis

from server.jobs import lifecycle, queue
from server.jobs.notifier import JobNotifier
from server.jobs.queue import WeightedOrder, next_queue, priority_class
from server.jobs.types import JOB_TYPES
from tests.actors import Actor
from tests.conftest import environment_of
from tests.jobs.requests import submit_job
from tests.processes import Processes


@pytest.mark.parametrize(
    ("priority", "name"),
    [(10, "high"), (8, "high"), (7, "normal"), (5, "normal"), (4, "normal"), (3, "low"), (1, "low")],
)
def test_priority_maps_to_its_class(priority: int, name: str) -> None:
    assert priority_class(priority) == name


def test_the_highest_class_comes_first_but_none_starves() -> None:
    names = ["high", "normal", "low"]
    firsts = [next(iter(next_queue(names, taken))) for taken in range(100)]  # type: ignore[arg-type]
    assert {name: firsts.count(name) for name in names} == {"high": 80, "normal": 10, "low": 10}
    assert [list(next_queue(names, 0)), list(next_queue(names, 9))] == [names, ["low", "high", "normal"]]  # type: ignore[arg-type]
    assert list(next_queue(["low"], 4)) == ["low"]  # type: ignore[arg-type]


@pytest.fixture
async def redis(isolated_stores: dict[str, str]):
    async with Redis.from_url(isolated_stores["redis_url"]) as client:
        await client.flushdb()
        yield client


async def send(redis: Redis, number: int, language: str, type: str = "CODE_EXECUTION") -> None:
    job = {"_id": f"job-{number}", "claim": 0, "priority": 5, "payload": {"language": language}}
    message = queue.make_message(job, JOB_TYPES["CODE_EXECUTION"])
    message.kwargs["type"] = type
    await queue.priority_queues(redis)["normal"].enqueue(message)


async def taken(redis: Redis, *capabilities: str) -> list[str]:
    """Take messages as a worker with these capabilities until none is left; return their jobs."""
    job_queue = WeightedOrder(
        redis,
        list(queue.priority_queues(redis).values()),
        JobNotifier(redis, on_cancel=print),
        capabilities=capabilities,
    )
    jobs = []
    while message := await job_queue._take_next():
        jobs.append(message.kwargs["job"])
    return jobs


async def test_message_a_worker_cannot_run_keeps_its_place_and_blocks_no_other(redis: Redis) -> None:
    for number in range(45):
        await send(redis, number, "python" if number in (20, 43) else "javascript")
    assert await taken(redis, "CODE_EXECUTION", "python", "bash") == ["job-20", "job-43"]
    await send(redis, 50, "python")
    assert await taken(redis, "CODE_EXECUTION", "python", "bash") == ["job-50"]
    others = [f"job-{number}" for number in range(45) if number not in (20, 43)]
    assert await taken(redis, "CODE_EXECUTION", "javascript") == others


async def test_message_of_an_unknown_type_is_left_to_newer_workers(redis: Redis) -> None:
    await send(redis, 1, "python", type="NEWER")
    await send(redis, 2, "python")
    assert await taken(redis, "CODE_EXECUTION", "python") == ["job-2"]
    assert await taken(redis, "CODE_EXECUTION", "NEWER", "python") == ["job-1"]


async def test_message_without_a_body_is_dropped(redis: Redis) -> None:
    await send(redis, 1, "python")
    await send(redis, 2, "python")
    await redis.delete("saq:job:{jobs.normal}:{jobs.normal}:job-1:1")
    assert await taken(redis, "CODE_EXECUTION", "python") == []
    assert await taken(redis, "CODE_EXECUTION", "python") == ["job-2"]


def test_saq_deadline_exceeds_all_mongodb_retries() -> None:
    assert (
        queue.TIMEOUT_MARGIN_SECONDS > 3 * lifecycle.MONGO_RETRY_TIMEOUT_SECONDS
    )  # for the claim, the output and the outcome


async def test_urgent_jobs_overtake_others(
    processes: Processes, isolated_stores: dict[str, str], http: aiohttp.ClientSession
) -> None:
    variables = environment_of(isolated_stores) | {"JOBS_PER_USER": "100", "WORKER_CONCURRENCY": "1"}
    server = processes.server(**variables)
    ada = await Actor(http, server.base, "Ada").register()
    late = [(await submit_job(ada, priority=1))["id"] for _ in range(6)]
    urgent = [(await submit_job(ada, priority=10))["id"] for _ in range(6)]
    processes.worker(**variables).ready()
    started = {job: (await ada.finished_job(job))["startedAt"] for job in late + urgent}
    assert sorted(started, key=started.__getitem__) == urgent + late


async def test_worker_takes_only_from_its_queues(
    processes: Processes, isolated_stores: dict[str, str], http: aiohttp.ClientSession
) -> None:
    variables = environment_of(isolated_stores)
    server = processes.server(**variables)
    ada = await Actor(http, server.base, "Ada").register()
    processes.worker("--queues", "high,low", **variables).ready()
    normal, low = (await submit_job(ada))["id"], (await submit_job(ada, priority=1))["id"]
    assert (await ada.finished_job(low))["status"] == "completed"
    await asyncio.sleep(0.5)
    assert (await ada.get(f"/jobs/{normal}"))["status"] == "pending"
    processes.worker("--queues", "normal", **variables).ready()
    assert (await ada.finished_job(normal))["status"] == "completed"


def test_unknown_queue_is_rejected_with_the_valid_names(processes: Processes) -> None:
    refused = processes.worker("--queues", "urgent")
    assert refused.wait() == 2
    assert "choose from high, normal, low" in refused.output
