"""The worker registry: POST rejects a language only if registered workers exist and none supports it."""

import asyncio
from collections.abc import Sequence

import pytest
from redis.asyncio import Redis

from server.jobs import workers
from server.jobs.workers import Report
from tests.conftest import MakeActor, MakeServer, environment
from tests.jobs.asking import ask, program
from tests.patience import PATIENCE_SECONDS
from tests.processes import Processes


def report(worker: str, *languages: str, queues: Sequence[str] = ("high", "normal", "low")) -> Report:
    tier = "landlock" if languages else "none"
    return Report(worker, tier, languages, queues, 10)


@pytest.fixture
async def redis(quiet: dict[str, str]):
    client = Redis.from_url(quiet["redis_url"])
    yield client
    await client.aclose()


async def test_language_is_rejected_only_if_no_worker_supports_it(
    make_server: MakeServer, make_actor: MakeActor, quiet: dict[str, str], redis: Redis
) -> None:
    ada = await make_actor("Ada", await make_server(**quiet))
    javascript = program("1", language="javascript")
    await ask(ada, javascript)  # without registered workers the job waits
    await workers.report(redis, report("first"))
    await asyncio.sleep(workers.REMEMBERED_SECONDS + 0.1)
    refused = await ada.post("/jobs", javascript)
    assert (refused.status, refused.code) == (503, "sandbox_unavailable")
    assert refused.headers["Retry-After"]
    await workers.report(redis, report("second", "python", "bash"))
    await asyncio.sleep(workers.REMEMBERED_SECONDS + 0.1)
    refused = await ada.post("/jobs", javascript)
    assert (refused.status, refused.code) == (422, "language_unavailable")
    await ask(ada)
    await ask(ada, {"type": "DATA_ANALYSIS", "payload": {"format": "csv", "content": "x"}})
    await workers.report(redis, report("third", "javascript"))
    await asyncio.sleep(workers.REMEMBERED_SECONDS + 0.1)
    await ask(ada, javascript)
    await workers.withdraw(redis, "third")
    await asyncio.sleep(workers.REMEMBERED_SECONDS + 0.1)
    assert (await ada.post("/jobs", javascript)).code == "language_unavailable"
    await workers.report(redis, report("fourth", "javascript", queues=["high"]))
    await asyncio.sleep(workers.REMEMBERED_SECONDS + 0.1)
    await ask(ada, javascript)  # the workers of its queue may be restarting


async def test_worker_heartbeat_expires_after_30_s(redis: Redis) -> None:
    await workers.report(redis, report("first", "python"))
    assert [heartbeat.worker for heartbeat in await workers.reported(redis)] == ["first"]
    [key] = [key async for key in redis.scan_iter("{jobs.workers}:first")]
    assert 25 < await redis.ttl(key) <= 30
    await redis.delete(key)
    assert await workers.reported(redis) == []


async def test_worker_registers_its_languages(
    make_server: MakeServer, make_actor: MakeActor, quiet: dict[str, str], processes: Processes
) -> None:
    ada = await make_actor("Ada", await make_server(**quiet))
    worker = processes.worker(**environment(quiet)).ready()
    async with asyncio.timeout(PATIENCE_SECONDS):
        while not (registered := (await ada.get("/health/ready"))["workers"]):
            await asyncio.sleep(0.1)
    assert "python" in registered[0]["languages"]
    assert registered[0]["sandbox"] in worker.output
    assert await asyncio.to_thread(worker.terminate) == 0
    await asyncio.sleep(workers.REMEMBERED_SECONDS + 0.1)
    assert (await ada.get("/health/ready"))["workers"] == []
