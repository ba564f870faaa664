"""Chaos test: users edit, send changes and run programs while faults kill stores and processes.

At the end, everything that was acknowledged must exist exactly once. The seed is printed; the same seed injects the
same faults in the same order.

    scripts/test tests/stories/test_chaos.py --full [--chaos-seconds 3600] [--chaos-seed 7]
"""

import asyncio
import os
import random
import signal
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from server.devstack.stack import Stack, free_port
from server.devstack.stores import Store
from tests.actors import Actor, Response
from tests.conftest import TEST_SETTINGS
from tests.devstack.pids import children_of
from tests.documents.editors import Editor, make_document
from tests.processes import Process, Processes
from tests.realtime.clients import ReconnectingClient, ReconnectingWriter, assert_ordered_and_once

SHORT_SECONDS, FULL_SECONDS = 8.0, 120.0
CALM_SECONDS = (1.0, 3.0)  # between two faults
SETTLING_SECONDS = 90
FINAL = ("completed", "failed", "cancelled")
AWAY = (aiohttp.ClientError, OSError, TimeoutError)


class ReplaceableProcess:
    """A process, and the function that starts its replacement."""

    def __init__(self, start: Callable[[], Process]) -> None:
        self._start = start
        self.process = start()

    def replace(self) -> None:
        self.process = self._start()


class Cluster:
    """Servers and workers on their own stores; each restarts at its old address.

    The full form has one more server, with two processes under a supervisor. This is no Redis Cluster.
    """

    def __init__(self, stack: Stack, processes: Processes, *, full: bool) -> None:
        self.stack = stack
        ports = [str(free_port()) for _ in range(2)]
        self.bases = [f"http://127.0.0.1:{port}" for port in ports]
        self._servers = [ReplaceableProcess(partial(processes.server, PORT=port)) for port in ports]
        self._workers = [ReplaceableProcess(processes.worker) for _ in range(2)]
        self._supervisor: Process | None = None
        if full:
            port = str(free_port())
            self._supervisor = processes.server("--processes", "2", PORT=port)
            self.bases.append(f"http://127.0.0.1:{port}")

    def faults(self) -> dict[str, Callable[[], Awaitable[Any]]]:
        stores = {f"{store.name} is killed": partial(self._restart, store) for store in self.stack.stores}
        faults = stores | {
            "a server is killed": partial(self._replace, self._servers, Process.kill),
            "a server is terminated": partial(self._replace, self._servers, Process.terminate),
            "a worker is killed": partial(self._replace, self._workers, Process.kill),
            "a worker is terminated": partial(self._replace, self._workers, Process.terminate),
        }
        if self._supervisor is not None:
            faults |= {"a supervised process is killed": self._kill_one, "a rolling restart begins": self._roll}
        return faults

    async def _restart(self, store: Store) -> None:
        store.kill()
        store.launch()  # not in a thread: the store would end with the thread
        await asyncio.to_thread(store.wait_ready)

    async def restart_exited(self) -> None:
        """Restart processes that failed to start during an outage of a store, as the host's process manager does."""
        while True:
            for running in [*self._servers, *self._workers]:
                if not running.process.alive:
                    running.replace()
            await asyncio.sleep(0.5)

    async def _replace(self, kind: list[ReplaceableProcess], end: Callable[[Process], Any]) -> None:
        """Replace the process of this kind that has run longest."""
        oldest = kind.pop(0)
        await asyncio.to_thread(end, oldest.process)
        oldest.replace()
        kind.append(oldest)

    async def _kill_one(self) -> None:
        assert self._supervisor is not None
        for process in list(children_of(self._supervisor.pid).values())[:1]:
            os.kill(process, signal.SIGKILL)

    async def _roll(self) -> None:
        assert self._supervisor is not None
        os.kill(self._supervisor.pid, signal.SIGHUP)


@pytest.fixture
def seconds(request: pytest.FixtureRequest, full: bool) -> float:
    return float(request.config.getoption("--chaos-seconds") or (FULL_SECONDS if full else SHORT_SECONDS))


@pytest.fixture
def seed(request: pytest.FixtureRequest) -> int:
    return int(request.config.getoption("--chaos-seed") or random.SystemRandom().randrange(1_000_000))


@pytest.fixture
def cluster(own_stack: Stack, tmp_path: Path, full: bool) -> Iterator[Cluster]:
    # The history keeps all events, because the final checks compare with it.
    history = {"HISTORY_EVENTS": "100000", "HISTORY_BYTES": str(1 << 28), "ACCESS_TOKEN_TTL": "24h"}
    settings = {"JOB_FAULT_RATE": "0.05", "LOG_LEVEL": "warning", "DRAIN_SECONDS": "2"}
    with Processes(TEST_SETTINGS | own_stack.environment | settings | history, tmp_path) as processes:
        yield Cluster(own_stack, processes, full=full)


async def retry_until_available(
    send: Callable[[], Awaitable[Response]], *, seconds: float = SETTLING_SECONDS
) -> Response:
    """Retry a request until a response that is neither a 503 nor a lost connection; a 500 fails the test."""
    async with asyncio.timeout(seconds):
        while True:
            try:
                response = await send()
            except AWAY:
                pass
            else:
                assert response.status != 500, response
                if response.status != 503:
                    return response
            await asyncio.sleep(0.1)


class Ledger:
    """The acknowledged writes of the test, by kind, and the tasks that make them."""

    def __init__(self, actor: Actor, workspace: str, project: str, bases: list[str]) -> None:
        self._actor, self.workspace, self.project, self._bases = actor, workspace, project, bases
        self.workspaces: dict[str, set[str]] = {}  # id → its name, or its possible names
        self.deleted: set[str] = set()
        self.maybe_deleted: set[str] = set()  # the response to the deletion was lost
        self.refreshed = 0
        self.jobs: dict[str, int] = {}  # id → number
        self.finished = False

    @property
    def actor(self) -> Actor:
        """The actor, at a random server."""
        return self._actor.at(random.choice(self._bases))

    @property
    def summary(self) -> str:
        existing, deleted = len(self.workspaces), len(self.deleted)
        return f"{len(self.jobs)} jobs, {existing} workspaces and {deleted} deleted ones, {self.refreshed} refreshes"

    async def get(self, path: str, **params: str) -> Response:
        return await retry_until_available(lambda: self.actor.get(path, params=params))

    async def _post(self, path: str, body: Any) -> Response:
        return await self.actor.post(path, body)

    async def list_all(self, path: str) -> list[dict[str, Any]]:
        """Return all items of a list, over all its pages."""
        items, cursor = [], {}
        while True:
            page = await self.get(path, limit="100", **cursor)
            items += page["items"]
            if page["nextCursor"] is None:
                return items
            cursor = {"cursor": page["nextCursor"]}

    async def attempt(self, method: str, path: str, body: Any, *, expected: int) -> Response | None:
        """Send a request once; return the response, or None if the outcome is unknown."""
        try:
            response = await self.actor.call(method, path, body)
        except AWAY:
            return None
        assert response.status in (expected, 503), response
        return response if response.status == expected else None

    async def history(self) -> list[dict[str, Any]]:
        """Return all durable events of the workspace."""
        return await self.list_all(f"/workspaces/{self.workspace}/events")

    async def make_workspaces(self) -> None:
        """Request each name once; rename a third of the created workspaces and delete another third."""
        number = 0
        while not self.finished:
            number += 1
            body = {"projectId": self.project, "name": f"workspace {number}"}
            created = await self.attempt("POST", "/workspaces", body, expected=201)
            if created is not None:
                self.workspaces[created["id"]] = {body["name"]}
                await (self._rename, self._delete, self._keep)[number % 3](created["id"])
            await asyncio.sleep(0.05)

    async def _rename(self, id: str) -> None:
        name = f"renamed {id}"
        if await self.attempt("PATCH", f"/workspaces/{id}", {"name": name}, expected=200):
            self.workspaces[id] = {name}
        else:
            self.workspaces[id].add(name)

    async def _delete(self, id: str) -> None:
        response = await self.attempt("DELETE", f"/workspaces/{id}", None, expected=204)
        (self.maybe_deleted if response is None else self.deleted).add(id)
        del self.workspaces[id]

    async def _keep(self, id: str) -> None:
        """Leave the workspace unchanged."""

    async def refresh(self, user: Actor) -> None:
        """Refresh a session repeatedly and check each new token; sign in again if a response is lost."""
        while not self.finished:
            try:
                response = await user.at(random.choice(self._bases)).post(
                    "/auth/refresh", {"refreshToken": user.refresh_token}
                )
            except AWAY:
                response = None
            if response is not None and response.status == 200:
                user.access_token, user.refresh_token = response["accessToken"], response["refreshToken"]
                self.refreshed += 1
            else:
                assert response is None or response.status == 503, response
                await self._sign_in(user)
            profile = await retry_until_available(lambda: user.at(random.choice(self._bases)).get("/auth/profile"))
            assert profile.status == 200, profile
            await asyncio.sleep(0.2)

    async def _sign_in(self, user: Actor) -> None:
        body = {"email": user.email, "password": user.password}
        response = await retry_until_available(lambda: user.at(random.choice(self._bases)).post("/auth/login", body))
        assert response.status == 200, response
        user.access_token, user.refresh_token = response["accessToken"], response["refreshToken"]

    async def run_programs(self) -> None:
        number = 0
        while not self.finished:
            number += 1
            payload = {"language": "python", "code": f"print({number})"}
            body = {"type": "CODE_EXECUTION", "payload": payload, "idempotencyKey": f"chaos-{number}"}
            submitted = await retry_until_available(partial(self._post, "/jobs", body))
            assert submitted.status in (200, 201), submitted
            self.jobs[submitted["job"]["id"]] = number
            await asyncio.sleep(0.3)


class RoamingEditor(Editor):
    """An editor that reconnects to a random server."""

    def __init__(self, actor: Actor, document: str, bases: list[str]) -> None:
        super().__init__(actor, document)
        self._bases = bases

    async def open(self) -> Editor:
        self.actor = self.actor.at(random.choice(self._bases))
        return await super().open()


async def type_until_finished(editor: Editor, name: str, ledger: Ledger, chance: random.Random) -> int:
    """Type letters at random places until the end; return how many were acknowledged."""
    typed = 0
    while not ledger.finished:
        typed += 1
        await editor.deliver(editor.insert(name, at=chance.randrange(len(editor.content) + 1)))
        await asyncio.sleep(0.05)
    return typed


async def write_until_finished(writer: ReconnectingWriter, name: str, ledger: Ledger) -> None:
    number = 0
    while not ledger.finished:
        number += 1
        await writer.write_one(f"{name} {number}")
        await asyncio.sleep(0.05)
    await writer.stop()


async def inject_faults(cluster: Cluster, chance: random.Random, seconds: float) -> Counter[str]:
    """Inject faults in rounds, each kind once per round; return how often each was injected."""
    injected: Counter[str] = Counter()
    remaining: list[str] = []
    deadline = asyncio.get_running_loop().time() + seconds
    while asyncio.get_running_loop().time() < deadline:
        await asyncio.sleep(chance.uniform(*CALM_SECONDS))
        faults = cluster.faults()
        remaining = remaining or chance.sample(sorted(faults), len(faults))
        fault = remaining.pop()
        injected[fault] += 1
        await faults[fault]()
    return injected


@pytest.mark.timeout(0)  # the duration is an option
async def test_faults_lose_and_duplicate_no_acknowledged_write(
    cluster: Cluster, http: aiohttp.ClientSession, seconds: float, seed: int, capsys: pytest.CaptureFixture[str]
) -> None:
    chance = random.Random(seed)
    restarting = asyncio.create_task(cluster.restart_exited())
    await until_ready(http, cluster)
    alice = await Actor(http, cluster.bases[0], "Alice").register()
    bob = await Actor(http, cluster.bases[1], "Bob").register()
    project = await alice.make_project(bob)
    workspace = await alice.make_workspace(project)
    document = await make_document(alice, workspace)
    ledger = Ledger(alice, workspace, project, cluster.bases)
    editors = [await RoamingEditor(actor, document, cluster.bases).open() for actor in (alice, bob)]
    writers = [ReconnectingWriter(actor, workspace, cluster.bases) for actor in (alice, bob)]

    async with (
        ReconnectingClient(bob, workspace, cluster.bases) as reader,
        ReconnectingClient(alice, workspace, cluster.bases) as other,
    ):
        work = [
            asyncio.create_task(task)
            for task in (
                ledger.make_workspaces(),
                ledger.run_programs(),
                ledger.refresh(await Actor(http, cluster.bases[0], "Carol").register()),
                *(write_until_finished(writer, f"w{number}", ledger) for number, writer in enumerate(writers)),
            )
        ]
        typing = [
            asyncio.create_task(type_until_finished(editor, letter, ledger, random.Random(seed + number)))
            for number, (editor, letter) in enumerate(zip(editors, "ab", strict=True))
        ]
        injected = await inject_faults(cluster, chance, seconds)
        ledger.finished = True
        async with asyncio.timeout(SETTLING_SECONDS):
            await asyncio.gather(*work)
            typed = await asyncio.gather(*typing)
        acknowledged = {id: change for writer in writers for id, change in writer.acknowledged.items()}
        for last in list(acknowledged.values())[-1:]:
            await reader.wait_for_change(last, seconds=SETTLING_SECONDS)
            await other.wait_for_change(last, seconds=SETTLING_SECONDS)

    with capsys.disabled():
        faults = ", ".join(f"{count} × {fault}" for fault, count in sorted(injected.items()))
        writes = f"{len(acknowledged)} events, {typed} letters, {ledger.summary}"
        print(f"\nchaos seed {seed}: {faults}\n  acknowledged: {writes}")
    await check_events(ledger, [reader, other], acknowledged)
    await check_document(ledger, document, editors, typed)
    await check_workspaces(ledger)
    await check_jobs(ledger)
    restarting.cancel()


async def until_ready(http: aiohttp.ClientSession, cluster: Cluster) -> None:
    for base in cluster.bases:
        operator = Actor(http, base, "Operator")
        assert (await retry_until_available(partial(operator.get, "/health/ready"))).status == 200


async def check_events(ledger: Ledger, members: list[ReconnectingClient], acknowledged: dict[str, Any]) -> None:
    history = await ledger.history()
    assert len({event["eventId"] for event in history}) == len(history)
    stored = {event["eventId"]: event.get("change") for event in history}
    assert {id: stored.get(id) for id in acknowledged} == acknowledged, "every acknowledged event is in the history"
    for member in members:
        assert_ordered_and_once(member)
        received = dict(zip(member.ids, (event.get("change") for event in member.events), strict=True))
        assert member.gaps or acknowledged.keys() <= received.keys(), "lost"
        both = acknowledged.keys() & received.keys()
        assert {id: received[id] for id in both} == {id: acknowledged[id] for id in both}


async def check_document(ledger: Ledger, document: str, editors: list[Editor], typed: list[int]) -> None:
    content = await ledger.get(f"/documents/{document}/content")
    assert Counter(content.body) == Counter({"a": typed[0], "b": typed[1]}), "each letter once"
    for editor in editors:
        await editor.reconnect()
        await editor.until(content.body)


async def check_workspaces(ledger: Ledger) -> None:
    workspaces = await ledger.list_all(f"/workspaces/project/{ledger.project}")
    existing = {workspace["id"]: workspace["name"] for workspace in workspaces}
    assert [id for id, names in ledger.workspaces.items() if existing.get(id) not in names] == [], "lost"
    assert ledger.deleted & existing.keys() == set(), "deleted workspace exists again"
    # Acknowledged or not, each name was requested once.
    assert [name for name, times in Counter(existing.values()).items() if times > 1] == [], "duplicated"


async def check_jobs(ledger: Ledger) -> None:
    for id, number in ledger.jobs.items():
        async with asyncio.timeout(SETTLING_SECONDS):
            while (job := await ledger.get(f"/jobs/{id}"))["status"] not in FINAL:
                await asyncio.sleep(0.2)
        outcomes = [attempt for attempt in job["history"] if attempt["error"] is None]
        if job["status"] == "completed":
            assert (job["result"]["stdout"], len(outcomes)) == (f"{number}\n", 1), job.body
        else:  # three attempts with an injected fault each, or five lost workers
            assert (job["status"], outcomes) == ("failed", []), job.body
    assert sorted(job["id"] for job in await ledger.list_all("/jobs")) == sorted(ledger.jobs), "one job per key"
