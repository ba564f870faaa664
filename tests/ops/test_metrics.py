"""The metrics for Prometheus: of one process, of several, and of workers; for operators only."""

import asyncio
import os
import re
import signal

import aiohttp
import pytest
from prometheus_client.parser import text_string_to_metric_families

from server.devstack.stack import free_port
from server.ops.sampling import SAMPLE_INTERVAL_SECONDS
from tests.actors import Actor
from tests.conftest import MakeServer, environment_of
from tests.documents.editors import Editor, make_document
from tests.jobs.requests import program_job, submit_job
from tests.processes import Processes, Server
from tests.test_supervisor import members, started
from tests.timeouts import WAIT_TIMEOUT_SECONDS

HEALTH = 'http_request_duration_seconds_count{method="GET",route="/health",status="200"}'


async def scrape(http: aiohttp.ClientSession, base: str) -> dict[str, float]:
    """Return the samples by name and labels."""
    async with http.get(f"{base}/metrics", headers={"Connection": "close"}) as response:
        assert response.status == 200, await response.text()
        text = await response.text()
    list(text_string_to_metric_families(text))  # the text is valid for Prometheus
    pairs = (line.rpartition(" ") for line in text.splitlines() if not line.startswith("#"))
    return {name: float(value) for name, _, value in pairs}


async def wait_for_sample(http: aiohttp.ClientSession, base: str, name: str, value: float) -> None:
    """Wait until that sample has that value."""
    async with asyncio.timeout(WAIT_TIMEOUT_SECONDS):
        while (await scrape(http, base)).get(name) != value:
            await asyncio.sleep(0.1)


async def test_sockets_rooms_and_the_event_loop_are_measured(
    http: aiohttp.ClientSession, server: str, alice: Actor
) -> None:
    workspace = await alice.make_workspace()
    await wait_for_sample(http, server, "websocket_connections", 0)
    first, _ = await alice.connect(workspace), await alice.connect(workspace)
    await wait_for_sample(http, server, "websocket_connections", 2)
    await wait_for_sample(http, server, "websocket_rooms", 1)
    await first.close()
    await wait_for_sample(http, server, "websocket_connections", 1)
    samples = await scrape(http, server)
    assert samples["event_loop_lag_seconds_count"] > 0
    assert samples["redis_publish_lag_seconds_count"] > 0
    assert samples['postgres_pool_connections{state="idle"}'] >= 1
    assert samples["websocket_outbox_frames"] == 0


async def test_frames_and_closes_are_counted_and_sockets_are_not_requests(
    http: aiohttp.ClientSession, server: str, alice: Actor, bob: Actor
) -> None:
    before = await scrape_after_a_sample(http, server)
    workspace = await alice.make_workspace(None, bob)
    document = await make_document(alice, workspace)
    speaking, hearing = await alice.connect(workspace), await bob.connect(workspace)
    editors = [await Editor(who, document).open() for who in (alice, bob)]
    await editors[0].type("x")
    await editors[1].until("x")
    yjs = await http.ws_connect(f"{server}/yjs/{document}", headers=alice.headers)
    assert (await yjs.receive()).data
    # Four welcomes, two joins, two opened documents, one edit (its ack and its broadcast), USER_JOIN, one of /yjs.
    frames = 4 + 2 + 2 + 2 + 1 + 1
    async with asyncio.timeout(WAIT_TIMEOUT_SECONDS):
        while grown(before, await scrape(http, server), "websocket_frames_sent_total") < frames:
            await asyncio.sleep(0.1)
    await yjs.close()
    for socket in (speaking, hearing):
        await socket.close()
    closed = 'websocket_closed_total{code="1006"}'
    async with asyncio.timeout(WAIT_TIMEOUT_SECONDS):
        while grown(before, await scrape(http, server), closed) < 3:
            await asyncio.sleep(0.1)
    socket_samples = [name for name in await scrape(http, server) if 'route="/ws"' in name or 'route="/yjs' in name]
    assert not [name for name in socket_samples if 'status="101"' in name]


async def scrape_after_a_sample(http: aiohttp.ClientSession, base: str) -> dict[str, float]:
    """Return the samples after a sampling interval, so that they include the effects of earlier tests."""
    await asyncio.sleep(2 * SAMPLE_INTERVAL_SECONDS)
    return await scrape(http, base)


def grown(before: dict[str, float], after: dict[str, float], name: str) -> float:
    return after.get(name, 0.0) - before.get(name, 0.0)


async def test_every_process_reports_the_same_sums(processes: Processes, http: aiohttp.ClientSession) -> None:
    server = await started(processes)
    connector = aiohttp.TCPConnector(force_close=True)
    async with aiohttp.ClientSession(connector=connector) as session:
        for _ in range(40):
            async with session.get(f"{server.base}/health") as response:
                assert response.status == 200
        for _ in range(10):
            assert (await scrape(session, server.base))[HEALTH] == 40


async def test_counters_of_a_dead_process_stay_and_its_gauges_disappear(
    processes: Processes, http: aiohttp.ClientSession
) -> None:
    server = await started(processes)
    ada = await Actor(http, server.base, "Ada").register()
    sockets = [await ada.connect() for _ in range(8)]
    assert len(sockets) == 8
    await wait_for_sample(http, server.base, "websocket_connections", 8)
    registered = 'http_request_duration_seconds_count{method="POST",route="/api/v1/auth/register",status="201"}'
    for pid in members(server):
        os.kill(pid, signal.SIGKILL)
    await wait_for_restarts(server, times=2)
    await wait_for_sample(http, server.base, "websocket_connections", 0)
    assert (await scrape(http, server.base))[registered] == 1


async def wait_for_restarts(server: Server, *, times: int) -> None:
    async with asyncio.timeout(WAIT_TIMEOUT_SECONDS):
        while len(re.findall("server ready", server.output)) < 2 + times:
            await asyncio.sleep(0.05)


async def test_unfinished_jobs_are_counted_by_type_and_state(
    http: aiohttp.ClientSession, make_server: MakeServer, isolated_stores: dict[str, str]
) -> None:
    base = await make_server(**isolated_stores)
    ada = await Actor(http, base, "Ada").register()
    for _ in range(3):
        await submit_job(ada, program_job("print(1)"))
    await submit_job(ada, {**program_job("print(1)"), "runAt": "2100-01-01T00:00:00Z"})
    samples = await scrape(http, base)
    assert samples['jobs_unfinished{state="pending",type="CODE_EXECUTION"}'] == 3
    assert samples['jobs_unfinished{state="scheduled",type="CODE_EXECUTION"}'] == 1
    assert samples['jobs_oldest_seconds{state="pending",type="CODE_EXECUTION"}'] >= 0


async def test_workers_serve_metrics_at_their_own_port(
    processes: Processes, isolated_stores: dict[str, str], http: aiohttp.ClientSession
) -> None:
    variables, port = environment_of(isolated_stores), free_port()
    server = processes.server(**variables)
    workers = processes.worker("--processes", "2", METRICS_PORT=str(port), **variables)
    ada = await Actor(http, server.base, "Ada").register()
    job = await submit_job(ada, program_job("print(1)"))
    await ada.finished_job(job["id"])
    workers.ready()
    base = f"http://127.0.0.1:{port}"
    await wait_for_sample(http, base, 'jobs_finished_total{outcome="completed",type="CODE_EXECUTION"}', 1)
    samples = await scrape(http, base)
    assert samples['job_wait_seconds_count{type="CODE_EXECUTION"}'] == 1
    assert sum(value for name, value in samples.items() if name.startswith("sandbox_runs_total")) == 1


async def test_metrics_port_in_use_is_reported_in_one_line(
    processes: Processes, isolated_stores: dict[str, str], server: str
) -> None:
    port = server.rpartition(":")[2]
    worker = processes.worker(METRICS_PORT=port, **environment_of(isolated_stores))
    assert await asyncio.to_thread(worker.wait) == 1
    assert worker.output.strip() == f"error: Cannot listen on METRICS_PORT={port}: Address already in use"


@pytest.mark.parametrize("app_env", ["development", "production"])
async def test_metrics_require_credentials_if_they_are_set(
    app_env: str, make_server: MakeServer, http: aiohttp.ClientSession
) -> None:
    base = await make_server(app_env=app_env, ops_username="ada", ops_password="difference engine")

    async def status(*login: str) -> int:
        auth = aiohttp.encode_basic_auth(*login) if login else ""
        async with http.get(f"{base}/metrics", headers={"Authorization": auth} if auth else {}) as response:
            return response.status

    assert await status() == 401
    assert await status("ada", "wrong") == 401
    assert await status("ada", "difference engine") == 200


@pytest.mark.parametrize(("app_env", "expected"), [("development", 200), ("production", 404)])
async def test_production_has_no_metrics_without_credentials(
    app_env: str, expected: int, make_server: MakeServer, http: aiohttp.ClientSession
) -> None:
    base = await make_server(app_env=app_env)
    async with http.get(f"{base}/metrics") as response:
        assert response.status == expected
