"""Health, readiness, metrics and logs of a process, as an operator reads them."""

import asyncio

import aiohttp

from server.devstack.stack import Stack
from tests.actors import Actor
from tests.conftest import MakeServer, store_urls_of
from tests.processes import Processes
from tests.timeouts import WAIT_TIMEOUT_SECONDS


async def test_health_reports_a_running_process(http: aiohttp.ClientSession, server: str) -> None:
    response = await Actor(http, server, "Operator").get("/health")
    assert (response.status, response["status"]) == (200, "ok")
    assert response["uptime"] >= 0
    assert response["version"]


async def test_readiness_names_each_store_with_its_latency(http: aiohttp.ClientSession, server: str) -> None:
    response = await Actor(http, server, "Operator").get("/health/ready")
    assert (response.status, response["status"]) == (200, "ready")
    assert {"postgresql", "redis", "mongodb"} <= response["stores"].keys()
    assert all(store["status"] == "up" and store["latencyMs"] > 0 for store in response["stores"].values())


async def test_store_that_is_down_is_named_and_the_process_stays_healthy(
    http: aiohttp.ClientSession, own_stack: Stack, make_server: MakeServer
) -> None:
    base = await make_server(**store_urls_of(own_stack))
    operator = Actor(http, base, "Operator")
    assert (await operator.get("/health/ready")).status == 200
    for store, name in (
        (own_stack.valkey, "redis"),
        (own_stack.mongo, "mongodb"),
        (own_stack.postgres, "postgresql"),
    ):
        store.kill()
        async with asyncio.timeout(WAIT_TIMEOUT_SECONDS):
            response = await operator.get("/health/ready")
        assert (response.status, response["status"]) == (503, "unavailable")
        assert response["stores"][name]["status"] == "down"
        assert response.headers["Retry-After"]
    assert (await operator.get("/health")).status == 200


async def test_metrics_count_requests_by_route_template(http: aiohttp.ClientSession, alice: Actor) -> None:
    project = await alice.make_project()
    await alice.get(f"/projects/{project}")
    metrics = (await alice.get("/metrics")).body
    assert 'http_request_duration_seconds_count{method="GET",route="/api/v1/projects/{projectId}",status="200"}' in (
        metrics
    )
    assert project not in metrics


async def test_every_request_is_one_line_of_json_with_its_id(http: aiohttp.ClientSession, processes: Processes) -> None:
    server = processes.server()
    response = await Actor(http, server.base, "Ada").get("/projects", headers={"X-Request-Id": "mine-1"})
    assert response.headers["X-Request-Id"] == response["requestId"] == "mine-1"
    line = server.wait_for_output(r'\{[^\n]*"request_id":"mine-1"[^\n]*\}').group(0)
    assert '"path":"/api/v1/projects"' in line
    assert '"status":401' in line
