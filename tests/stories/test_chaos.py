"""A bad day: people edit, talk and run programs while whatever can be killed is killed; then the books are checked.

What was acknowledged must be there, once. The seed is printed: the same one kills the same things in the same order.

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
from tests.actors import Actor, Answer
from tests.conftest import TEST_SETTINGS
from tests.devstack.pids import children_of
from tests.documents.editors import Editor, make_document
from tests.processes import Process, Processes
from tests.realtime.clients import Member, Writer, assert_ordered_and_once

SHORT_SECONDS, FULL_SECONDS = 8.0, 120.0
CALM_SECONDS = (1.0, 3.0)  # between two blows
SETTLING_SECONDS = 90
FINAL = ("completed", "failed", "cancelled")
AWAY = (aiohttp.ClientError, OSError, TimeoutError)


class Running:
    """A process, and how to start another one in its place."""

    def __init__(self, start: Callable[[], Process]) -> None:
        self._start = start
        self.process = start()

    def replace(self) -> None:
        self.process = self._start()


class Town:
    """Servers and workers on stores of their own; each comes back at its old address. In the full form one more
    server has two processes, under a supervisor."""

    def __init__(self, stack: Stack, processes: Processes, *, full: bool) -> None:
        self.stack = stack
        ports = [str(free_port()) for _ in range(2)]
        self.bases = [f"http://127.0.0.1:{port}" for port in ports]
        self._servers = [Running(partial(processes.server, PORT=port)) for port in ports]
        self._workers = [Running(processes.worker) for _ in range(2)]
        self._supervisor: Process | None = None
        if full:
            port = str(free_port())
            self._supervisor = processes.server("--processes", "2", PORT=port)
            self.bases.append(f"http://127.0.0.1:{port}")

    def blows(self) -> dict[str, Callable[[], Awaitable[Any]]]:
        stores = {f"{store.name} is killed": partial(self._restart, store) for store in self.stack.stores}
        blows = stores | {
            "a server is killed": partial(self._replace, self._servers, Process.kill),
            "a server is told to stop": partial(self._replace, self._servers, Process.terminate),
            "a worker is killed": partial(self._replace, self._workers, Process.kill),
            "a worker is told to stop": partial(self._replace, self._workers, Process.terminate),
        }
        if self._supervisor is not None:
            blows |= {"a supervised process is killed": self._kill_one, "a supervisor is told to restart": self._roll}
        return blows

    async def _restart(self, store: Store) -> None:
        store.kill()
        store.begin()  # not in a thread: it would end with that
        await asyncio.to_thread(store.wait_ready)

    async def tend(self) -> None:
        """As the host's own manager of processes: who could not start, because a store was away, starts again."""
        while True:
            for each in [*self._servers, *self._workers]:
                if not each.process.alive:
                    each.replace()
            await asyncio.sleep(0.5)

    async def _replace(self, kind: list[Running], end: Callable[[Process], Any]) -> None:
        """The one that has lived longest."""
        one = kind.pop(0)
        await asyncio.to_thread(end, one.process)
        one.replace()
        kind.append(one)

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
def town(own_stack: Stack, tmp_path: Path, full: bool) -> Iterator[Town]:
    # The history holds all of the day: it is what the checker compares with.
    history = {"HISTORY_EVENTS": "100000", "HISTORY_BYTES": str(1 << 28), "ACCESS_TOKEN_TTL": "24h"}
    calm = {"JOB_FAULT_RATE": "0.05", "LOG_LEVEL": "warning", "DRAIN_SECONDS": "2"}
    with Processes(TEST_SETTINGS | own_stack.environment | calm | history, tmp_path) as processes:
        yield Town(own_stack, processes, full=full)


async def insist(ask: Callable[[], Awaitable[Answer]], *, seconds: float = SETTLING_SECONDS) -> Answer:
    """The first answer that is neither a 503 nor silence; a 500 is nobody's right."""
    async with asyncio.timeout(seconds):
        while True:
            try:
                answer = await ask()
            except AWAY:
                pass
            else:
                assert answer.status != 500, answer
                if answer.status != 503:
                    return answer
            await asyncio.sleep(0.1)


class Books:
    """What was acknowledged, by its kind."""

    def __init__(self, actor: Actor, workspace: str, project: str, bases: list[str]) -> None:
        self._actor, self.workspace, self.project, self._bases = actor, workspace, project, bases
        self.workspaces: dict[str, set[str]] = {}  # id → its name, or those that it may have
        self.deleted: set[str] = set()
        self.doubtful: set[str] = set()  # asked to be deleted, and nobody knows
        self.refreshed = 0
        self.jobs: dict[str, int] = {}  # id → number
        self.over = False

    @property
    def actor(self) -> Actor:
        """At either server."""
        return self._actor.at(random.choice(self._bases))

    @property
    def told(self) -> str:
        kept, deleted = len(self.workspaces), len(self.deleted)
        return f"{len(self.jobs)} jobs, {kept} workspaces and {deleted} deleted ones, {self.refreshed} refreshes"

    async def get(self, path: str, **params: str) -> Answer:
        return await insist(lambda: self.actor.get(path, params=params))

    async def _post(self, path: str, body: Any) -> Answer:
        return await self.actor.post(path, body)

    async def listed(self, path: str) -> list[dict[str, Any]]:
        """All items of a list, over all its pages."""
        items, cursor = [], {}
        while True:
            page = await self.get(path, limit="100", **cursor)
            items += page["items"]
            if page["nextCursor"] is None:
                return items
            cursor = {"cursor": page["nextCursor"]}

    async def attempt(self, method: str, path: str, body: Any, *, well: int) -> Answer | None:
        """The answer where it is done; None where nobody knows."""
        try:
            answer = await self.actor.call(method, path, body)
        except AWAY:
            return None
        assert answer.status in (well, 503), answer
        return answer if answer.status == well else None

    async def history(self) -> list[dict[str, Any]]:
        """All durable events of the workspace."""
        return await self.listed(f"/workspaces/{self.workspace}/events")

    async def make_workspaces(self) -> None:
        """Every name is asked for once; of what there is, some is renamed and some deleted."""
        number = 0
        while not self.over:
            number += 1
            body = {"projectId": self.project, "name": f"workspace {number}"}
            made = await self.attempt("POST", "/workspaces", body, well=201)
            if made is not None:
                self.workspaces[made["id"]] = {body["name"]}
                await (self._rename, self._delete, self._leave)[number % 3](made["id"])
            await asyncio.sleep(0.05)

    async def _rename(self, id: str) -> None:
        name = f"renamed {id}"
        if await self.attempt("PATCH", f"/workspaces/{id}", {"name": name}, well=200):
            self.workspaces[id] = {name}
        else:
            self.workspaces[id].add(name)

    async def _delete(self, id: str) -> None:
        done = await self.attempt("DELETE", f"/workspaces/{id}", None, well=204)
        (self.doubtful if done is None else self.deleted).add(id)
        del self.workspaces[id]

    async def _leave(self, id: str) -> None:
        """As it is."""

    async def refresh(self, who: Actor) -> None:
        """A session of its own: what a refresh has given is good. Where the answer was lost, they sign in again."""
        while not self.over:
            try:
                given = await who.at(random.choice(self._bases)).post(
                    "/auth/refresh", {"refreshToken": who.refresh_token}
                )
            except AWAY:
                given = None
            if given is not None and given.status == 200:
                who.access_token, who.refresh_token = given["accessToken"], given["refreshToken"]
                self.refreshed += 1
            else:
                assert given is None or given.status == 503, given
                await self._sign_in(who)
            good = await insist(lambda: who.at(random.choice(self._bases)).get("/auth/profile"))
            assert good.status == 200, good
            await asyncio.sleep(0.2)

    async def _sign_in(self, who: Actor) -> None:
        body = {"email": who.email, "password": who.password}
        given = await insist(lambda: who.at(random.choice(self._bases)).post("/auth/login", body))
        assert given.status == 200, given
        who.access_token, who.refresh_token = given["accessToken"], given["refreshToken"]

    async def run_programs(self) -> None:
        number = 0
        while not self.over:
            number += 1
            payload = {"language": "python", "code": f"print({number})"}
            body = {"type": "CODE_EXECUTION", "payload": payload, "idempotencyKey": f"chaos-{number}"}
            asked = await insist(partial(self._post, "/jobs", body))
            assert asked.status in (200, 201), asked
            self.jobs[asked["job"]["id"]] = number
            await asyncio.sleep(0.3)


class Wanderer(Editor):
    """Comes back at any server."""

    def __init__(self, actor: Actor, document: str, bases: list[str]) -> None:
        super().__init__(actor, document)
        self._bases = bases

    async def open(self) -> Editor:
        self.actor = self.actor.at(random.choice(self._bases))
        return await super().open()


async def type_on(editor: Editor, name: str, books: Books, chance: random.Random) -> int:
    """Letters at random places until it is over; how many were acknowledged."""
    typed = 0
    while not books.over:
        typed += 1
        await editor.deliver(editor.insert(name, at=chance.randrange(len(editor.content) + 1)))
        await asyncio.sleep(0.05)
    return typed


async def talk(writer: Writer, name: str, books: Books) -> None:
    number = 0
    while not books.over:
        number += 1
        await writer.write_one(f"{name} {number}")
        await asyncio.sleep(0.05)
    await writer.stop()


async def strike(town: Town, chance: random.Random, seconds: float) -> Counter[str]:
    """Blows in rounds, in each of which every kind has its turn once."""
    struck: Counter[str] = Counter()
    left: list[str] = []
    ends = asyncio.get_running_loop().time() + seconds
    while asyncio.get_running_loop().time() < ends:
        await asyncio.sleep(chance.uniform(*CALM_SECONDS))
        blows = town.blows()
        left = left or chance.sample(sorted(blows), len(blows))
        blow = left.pop()
        struck[blow] += 1
        await blows[blow]()
    return struck


@pytest.mark.timeout(0)  # as long as it is asked to be
async def test_a_bad_day_loses_nothing_and_doubles_nothing(
    town: Town, http: aiohttp.ClientSession, seconds: float, seed: int, capsys: pytest.CaptureFixture[str]
) -> None:
    chance = random.Random(seed)
    tending = asyncio.create_task(town.tend())
    await until_ready(http, town)
    alice = await Actor(http, town.bases[0], "Alice").register()
    bob = await Actor(http, town.bases[1], "Bob").register()
    project = await alice.make_project(bob)
    workspace = await alice.make_workspace(project)
    document = await make_document(alice, workspace)
    books = Books(alice, workspace, project, town.bases)
    editors = [await Wanderer(who, document, town.bases).open() for who in (alice, bob)]
    writers = [Writer(who, workspace, town.bases) for who in (alice, bob)]

    async with Member(bob, workspace, town.bases) as reader, Member(alice, workspace, town.bases) as other:
        work = [
            asyncio.create_task(task)
            for task in (
                books.make_workspaces(),
                books.run_programs(),
                books.refresh(await Actor(http, town.bases[0], "Carol").register()),
                *(talk(writer, f"w{number}", books) for number, writer in enumerate(writers)),
            )
        ]
        typing = [
            asyncio.create_task(type_on(editor, letter, books, random.Random(seed + number)))
            for number, (editor, letter) in enumerate(zip(editors, "ab", strict=True))
        ]
        struck = await strike(town, chance, seconds)
        books.over = True
        async with asyncio.timeout(SETTLING_SECONDS):
            await asyncio.gather(*work)
            typed = await asyncio.gather(*typing)
        said = {id: change for writer in writers for id, change in writer.acknowledged.items()}
        for last in list(said.values())[-1:]:
            await reader.has_heard(last, seconds=SETTLING_SECONDS)
            await other.has_heard(last, seconds=SETTLING_SECONDS)

    with capsys.disabled():
        blows = ", ".join(f"{count} × {blow}" for blow, count in sorted(struck.items()))
        print(f"\nchaos seed {seed}: {blows}\n  acknowledged: {len(said)} events, {typed} letters, {books.told}")
    await check_events(books, [reader, other], said)
    await check_document(books, document, editors, typed)
    await check_workspaces(books)
    await check_jobs(books)
    tending.cancel()


async def until_ready(http: aiohttp.ClientSession, town: Town) -> None:
    for base in town.bases:
        operator = Actor(http, base, "Operator")
        assert (await insist(partial(operator.get, "/health/ready"))).status == 200


async def check_events(books: Books, members: list[Member], said: dict[str, Any]) -> None:
    history = await books.history()
    assert len({event["eventId"] for event in history}) == len(history)
    told = {event["eventId"]: event.get("change") for event in history}
    assert {id: told.get(id) for id in said} == said, "what was acknowledged is in the history"
    for member in members:
        assert_ordered_and_once(member)
        heard = dict(zip(member.ids, (event.get("change") for event in member.events), strict=True))
        assert member.gaps or said.keys() <= heard.keys(), "lost"
        assert {id: heard[id] for id in said if id in heard} == {id: said[id] for id in said if id in heard}


async def check_document(books: Books, document: str, editors: list[Editor], typed: list[int]) -> None:
    shown = await books.get(f"/documents/{document}/content")
    assert Counter(shown.body) == Counter({"a": typed[0], "b": typed[1]}), "each letter once"
    for editor in editors:
        await editor.reconnect()
        await editor.until(shown.body)


async def check_workspaces(books: Books) -> None:
    listed = await books.listed(f"/workspaces/project/{books.project}")
    there = {each["id"]: each["name"] for each in listed}
    assert [id for id, names in books.workspaces.items() if there.get(id) not in names] == [], "lost"
    assert books.deleted & there.keys() == set(), "came back"
    # Acknowledged or not, each was asked for once.
    assert [name for name, times in Counter(there.values()).items() if times > 1] == [], "doubled"


async def check_jobs(books: Books) -> None:
    for id, number in books.jobs.items():
        async with asyncio.timeout(SETTLING_SECONDS):
            while (job := await books.get(f"/jobs/{id}"))["status"] not in FINAL:
                await asyncio.sleep(0.2)
        outcomes = [each for each in job["history"] if each["error"] is None]
        if job["status"] == "completed":
            assert (job["result"]["stdout"], len(outcomes)) == (f"{number}\n", 1), job.body
        else:  # three attempts that had a fault of their own each, or five lost workers
            assert (job["status"], outcomes) == ("failed", []), job.body
    assert sorted(each["id"] for each in await books.listed("/jobs")) == sorted(books.jobs), "one job for each key"
