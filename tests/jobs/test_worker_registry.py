"""The worker registry: POST rejects a language only if registered workers exist and none supports it."""

import asyncio
from collections.abc import Sequence

import pytest
from redis.asyncio import Redis

from server.jobs import worker_registry
from server.jobs.worker_registry import WorkerHeartbeat
from tests.conftest import MakeActor, MakeServer, environment_of
from tests.jobs.requests import program_job, submit_job
from tests.processes import Processes
from tests.timeouts import WAIT_TIMEOUT_SECONDS


def report(worker: str, *languages: str, queues: Sequence[str] = ("high", "normal", "low")) -> WorkerHeartbeat:
    tier = "landlock" if languages else "none"
    return WorkerHeartbeat(worker, tier, languages, queues, 10)


@pytest.fixture
async def redis(isolated_stores: dict[str, str]):
    client = Redis.from_url(isolated_stores["redis_url"])
    yield client
    await client.aclose()


async def test_language_is_rejected_only_if_no_worker_supports_it(
    make_server: MakeServer, make_actor: MakeActor, isolated_stores: dict[str, str], redis: Redis
) -> None:
    ada = await make_actor("Ada", await make_server(**isolated_stores))
    javascript = program_job("1", language="javascript")
    await submit_job(ada, javascript)  # without registered workers the job waits
    await worker_registry.send_heartbeat(redis, report("first"))
    await asyncio.sleep(worker_registry.CACHE_TTL_SECONDS + 0.1)
    refused = await ada.post("/jobs", javascript)
    assert (refused.status, refused.code) == (503, "sandbox_unavailable")
    assert refused.headers["Retry-After"]
    await worker_registry.send_heartbeat(redis, report("second", "python", "bash"))
    await asyncio.sleep(worker_registry.CACHE_TTL_SECONDS + 0.1)
    refused = await ada.post("/jobs", javascript)
    assert (refused.status, refused.code) == (422, "language_unavailable")
    await submit_job(ada)
    await submit_job(ada, {"type": "DATA_ANALYSIS", "payload": {"format": "csv", "content": "x"}})
    await worker_registry.send_heartbeat(redis, report("third", "javascript"))
    await asyncio.sleep(worker_registry.CACHE_TTL_SECONDS + 0.1)
    await submit_job(ada, javascript)
    await worker_registry.unregister(redis, "third")
    await asyncio.sleep(worker_registry.CACHE_TTL_SECONDS + 0.1)
    assert (await ada.post("/jobs", javascript)).code == "language_unavailable"
    await worker_registry.send_heartbeat(redis, report("fourth", "javascript", queues=["high"]))
    await asyncio.sleep(worker_registry.CACHE_TTL_SECONDS + 0.1)
    await submit_job(ada, javascript)  # the workers of its queue may be restarting


async def test_worker_heartbeat_expires_after_30_s(redis: Redis) -> None:
    await worker_registry.send_heartbeat(redis, report("first", "python"))
    assert [heartbeat.worker for heartbeat in await worker_registry.list_workers(redis)] == ["first"]
    [key] = [key async for key in redis.scan_iter("{jobs.workers}:first")]
    assert 25 < await redis.ttl(key) <= 30
    await redis.delete(key)
    assert await worker_registry.list_workers(redis) == []


async def test_worker_registers_its_languages(
    make_server: MakeServer, make_actor: MakeActor, isolated_stores: dict[str, str], processes: Processes
) -> None:
    ada = await make_actor("Ada", await make_server(**isolated_stores))
    worker = processes.worker(**environment_of(isolated_stores)).ready()
    async with asyncio.timeout(WAIT_TIMEOUT_SECONDS):
        while not (registered := (await ada.get("/health/ready"))["workers"]):
            await asyncio.sleep(0.1)
    assert "python" in registered[0]["languages"]
    assert registered[0]["sandbox"] in worker.output
    assert await asyncio.to_thread(worker.terminate) == 0
    await asyncio.sleep(worker_registry.CACHE_TTL_SECONDS + 0.1)
    assert (await ada.get("/health/ready"))["workers"] == []
