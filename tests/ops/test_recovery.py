"""Recovery after an outage of a store: the service returns without a burst of connections, and access stays denied."""

import asyncio
import time
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import UTC, datetime

import aiohttp
import pytest

from server import postgres, resources
from server.devstack.stack import Stack
from server.jobs import artifacts
from server.ops import sampling
from tests.actors import Actor, Response
from tests.conftest import MakeActor
from tests.documents.editors import make_document
from tests.faults import FaultyNetwork, Mode
from tests.ops.conftest import Scenario
from tests.ops.test_faults import MONGO, NAMES, POSTGRES, REDIS, detail_of, requests_of
from tests.realtime.clients import ReconnectingClient
from tests.timeouts import WAIT_TIMEOUT_SECONDS

CROWD = 50  # at once
# Connections of a process to each store, and the spare ones that it may open for its own purposes.
POOLS = {
    POSTGRES: postgres.MAX_POOL_SIZE,
    REDIS: resources.MAX_REDIS_CONNECTIONS,
    MONGO: resources.MAX_MONGO_CONNECTIONS,
}
SPARE = 5
NAME_OF_ARTIFACT = "export.zip"
ARTIFACT_BYTES = 24 << 20  # more than the socket buffers on its way hold
Call = tuple[str, str, object]
OF_EACH_STORE: list[Call] = [("GET", "/auth/profile", None), ("GET", "/jobs", None), ("POST", "/auth/ws-ticket", None)]


@dataclass
class Fixtures:
    """More of Alice's resources: a document, and a job with an artifact. Victor is a viewer."""

    victor: Actor
    document: str
    made: str

    @property
    def file(self) -> str:
        return f"/jobs/{self.made}/artifacts/{NAME_OF_ARTIFACT}"


@pytest.fixture
async def fixtures(scenario: Scenario, make_actor: MakeActor, stack: Stack) -> Fixtures:
    victor = await make_actor("Victor", scenario.alice.base)
    await scenario.alice.add(victor, scenario.project, role="VIEWER")
    body = {
        "type": "EXPORT",
        "payload": {"workspaceId": scenario.workspace, "format": "zip"},
        "runAt": "2100-01-01T00:00:00Z",
    }
    job = (await scenario.alice.post("/jobs", body))["job"]["id"]
    await give_artifact(stack, job)
    return Fixtures(victor, await make_document(scenario.alice, scenario.workspace, content="one"), job)


async def give_artifact(stack: Stack, job: str) -> None:
    """Store an artifact as a worker does."""
    client = resources.mongo_client(stack.mongo.url)
    mongo, now = client.get_default_database(), datetime.now(UTC)
    record = {"_id": job, "claim": 0}
    kind = {"name": NAME_OF_ARTIFACT, "content_type": "application/zip"}
    async with artifacts.upload(mongo, job=record, now=now, **kind) as upload:
        await upload.write(bytes(ARTIFACT_BYTES))
    described = artifacts.result_entry(upload, job=record, name=NAME_OF_ARTIFACT, now=now)
    await mongo.jobs.update_one({"_id": job}, {"$set": {"status": "completed", "result": {"artifact": described}}})
    client.close()


def further_calls(scenario: Scenario, things: Fixtures) -> list[Call]:
    return [
        ("GET", f"/documents/{things.document}", None),
        ("GET", f"/documents/{things.document}/content", None),
        ("GET", f"/documents/{things.document}/versions", None),
        ("GET", f"/workspaces/{scenario.workspace}/documents", None),
        ("POST", f"/workspaces/{scenario.workspace}/documents", {"path": f"{time.monotonic()}.txt", "content": "x"}),
        ("PATCH", f"/workspaces/{scenario.workspace}", {"name": "Renamed"}),
        ("GET", f"/jobs/{scenario.job}/logs", None),
        ("HEAD", things.file, None),
        ("GET", "/metrics", None),
        ("GET", "/health/ready", None),
        ("GET", "/health", None),
    ]


async def ask_all(scenario: Scenario, who: Actor, requests: Iterable[Call]) -> list[tuple[str, Response]]:
    """Send all requests concurrently; return each path with its response, which must arrive in time."""
    requests = list(requests)
    return list(
        zip(
            [path for _, path, _ in requests],
            await asyncio.gather(*(scenario.call(who, *request) for request in requests)),
            strict=True,
        )
    )


@pytest.mark.parametrize("mode", [Mode.STOPPED, Mode.BLACK_HOLE], ids=lambda mode: mode.name.lower())
@pytest.mark.real_timeouts
@pytest.mark.parametrize("store", [POSTGRES, REDIS, MONGO])
async def test_requests_are_answered_in_time_and_succeed_when_the_store_is_back(
    store: str, mode: Mode, network: FaultyNetwork, scenario: Scenario, fixtures: Fixtures
) -> None:
    requests = [*requests_of(scenario.alice, scenario), *further_calls(scenario, fixtures)]
    await network.stores[store].set_mode(mode)
    responses = await ask_all(scenario, scenario.alice, requests)
    for path, response in responses:
        assert response.status < 500 or response.status == 503, (path, response)
        if path == "/health/ready":
            assert response.status == 503
            assert response["stores"][NAMES[store].lower()]["status"] == "down"
        elif response.status == 503 and response.body:
            assert response["detail"] == detail_of(store, mode), (path, response)
    assert {response.status for path, response in responses if path in ("/metrics", "/health")} == {200}

    before = network.stores[store].connections
    await network.stores[store].set_mode(Mode.PASS)
    async with asyncio.timeout(scenario.response_timeout_seconds):
        while any(response.status >= 500 for _, response in await ask_all(scenario, scenario.alice, OF_EACH_STORE)):
            await asyncio.sleep(0.05)
    for request in requests:
        [(path, response)] = await ask_all(scenario, scenario.alice, [request])
        assert response.status < 500, (path, response)
    await ask_all(scenario, scenario.alice, [("GET", f"/jobs/{scenario.job}", None)] * CROWD)
    assert network.stores[store].connections - before <= POOLS[store] + SPARE


@pytest.mark.parametrize("mode", [Mode.STOPPED, Mode.BLACK_HOLE], ids=lambda mode: mode.name.lower())
@pytest.mark.real_timeouts
@pytest.mark.parametrize("store", [POSTGRES, MONGO])
async def test_concurrent_requests_are_answered_in_time(
    store: str, mode: Mode, network: FaultyNetwork, scenario: Scenario
) -> None:
    # The user's own job needs PostgreSQL only while the blacklist in Redis is young, and may lack ended sessions.
    path = {POSTGRES: f"/projects/{scenario.project}", MONGO: f"/jobs/{scenario.job}"}[store]
    await network.stores[store].set_mode(mode)
    responses = await ask_all(scenario, scenario.alice, [("GET", path, None)] * CROWD)
    assert {(response.status, response["detail"]) for _, response in responses} == {(503, detail_of(store, mode))}


@pytest.mark.parametrize("mode", [Mode.STOPPED, Mode.BLACK_HOLE], ids=lambda mode: mode.name.lower())
async def test_sockets_resync_as_soon_as_redis_is_back(mode: Mode, network: FaultyNetwork, scenario: Scenario) -> None:
    async with ReconnectingClient(scenario.alice, scenario.workspace, [scenario.alice.base]) as member:
        await network.stores[REDIS].set_mode(mode)
        await asyncio.sleep(3)  # so that pauses between attempts have grown
        await network.stores[REDIS].set_mode(Mode.PASS)
        before = network.stores[REDIS].connections
        async with asyncio.timeout(scenario.response_timeout_seconds):
            while "workspace:resync" not in member.events_received:
                await asyncio.sleep(0.02)
        assert network.stores[REDIS].connections - before <= SPARE


@pytest.mark.real_timeouts
@pytest.mark.parametrize("store", [POSTGRES, REDIS, MONGO])
async def test_viewer_cannot_write_during_an_outage(
    store: str, network: FaultyNetwork, scenario: Scenario, fixtures: Fixtures
) -> None:
    await network.stores[store].set_mode(Mode.STOPPED)
    payload = {"language": "python", "documentId": fixtures.document}
    writes: list[Call] = [
        ("PATCH", f"/projects/{scenario.project}", {"name": "Victor's"}),
        ("DELETE", f"/projects/{scenario.project}", None),
        ("POST", "/workspaces", {"projectId": scenario.project, "name": "Victor's"}),
        ("DELETE", f"/workspaces/{scenario.workspace}", None),
        ("POST", f"/workspaces/{scenario.workspace}/documents", {"path": "victors.txt", "content": "x"}),
        ("DELETE", f"/documents/{fixtures.document}", None),
        ("POST", f"/projects/{scenario.project}/collaborators", {"email": scenario.mallory.email, "role": "OWNER"}),
        ("POST", "/jobs", {"type": "CODE_EXECUTION", "payload": payload}),
    ]
    for who in (fixtures.victor, scenario.mallory):
        for path, response in await ask_all(scenario, who, writes):
            assert response.status in (403, 404, 503), (who.name, path, response)
    await network.stores[store].set_mode(Mode.PASS)


async def test_client_detects_an_interrupted_download(
    network: FaultyNetwork, scenario: Scenario, fixtures: Fixtures, http: aiohttp.ClientSession
) -> None:
    address = f"{scenario.alice.base}/api/v1{fixtures.file}"
    async with http.get(address, headers=scenario.alice.headers) as response:
        assert (response.status, int(response.headers["Content-Length"])) == (200, ARTIFACT_BYTES)
        await response.content.readexactly(1)
        await network.stores[MONGO].set_mode(Mode.STOPPED)
        with pytest.raises((aiohttp.ClientPayloadError, aiohttp.ClientConnectionError)):
            async with asyncio.timeout(WAIT_TIMEOUT_SECONDS):
                await response.read()


@pytest.fixture
def frequent_samples(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sampling, "PROBE_INTERVAL_SECONDS", 0.2)


@pytest.mark.real_timeouts("redis_url")
@pytest.mark.usefixtures("frequent_samples")
async def test_metrics_report_the_store_that_is_down(network: FaultyNetwork, scenario: Scenario) -> None:
    async def up(store: str, value: int) -> None:
        async with asyncio.timeout(WAIT_TIMEOUT_SECONDS):
            while f'store_up{{store="{store}"}} {value}.0' not in (await scenario.alice.get("/metrics")).body:
                await asyncio.sleep(0.1)

    await up("redis", 1)
    await network.stores[REDIS].set_mode(Mode.BLACK_HOLE)
    await up("redis", 0)
    await up("postgresql", 1)
    await network.stores[REDIS].set_mode(Mode.PASS)
    await up("redis", 1)
