"""Queues by class: the highest first, none starves, and each worker takes what it is for."""

import asyncio

import aiohttp
import pytest

from server.jobs.queue import class_of, in_turn
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
