"""A bad day: people edit, talk and run programs while whatever can be killed is killed; then the books are checked.

What was acknowledged must be there, once. The seed is printed: the same one kills the same things in the same order.
"""

import asyncio
import os
import random
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from server.devstack.stack import Stack, free_port
from tests.actors import Actor, Answer
from tests.conftest import TEST_SETTINGS
from tests.documents.editors import Editor, make_document
from tests.processes import Process, Processes
from tests.realtime.clients import Member, Writer, assert_ordered_and_once

SHORT_SECONDS, FULL_SECONDS = 8, 120
CALM_SECONDS = (1.0, 3.0)  # between two blows
SETTLING_SECONDS = 90
FINAL = ("completed", "failed", "cancelled")
AWAY = (aiohttp.ClientError, OSError, TimeoutError)


class Town:
    """Two servers and two workers on stores of their own; each comes back at its old address."""

    def __init__(self, stack: Stack, processes: Processes) -> None:
        self.stack = stack
        self._processes = processes
        self._ports = [str(free_port()) for _ in range(2)]
        self.bases = [f"http://127.0.0.1:{port}" for port in self._ports]
        self._servers: list[Process] = [processes.server(PORT=port) for port in self._ports]
        self._workers: list[Process] = [processes.worker() for _ in range(2)]

    def blows(self) -> dict[str, Callable[[], None]]:
        stores = {f"{store.name} is killed": self._restarted(store) for store in self.stack.stores}
        return stores | {
            "a server is killed": lambda: self._replace(self._servers, Process.kill),
            "a server is told to stop": lambda: self._replace(self._servers, lambda server: server.terminate()),
            "a worker is killed": lambda: self._replace(self._workers, Process.kill),
            "a worker is told to stop": lambda: self._replace(self._workers, lambda worker: worker.terminate()),
        }

    def _restarted(self, store: Any) -> Callable[[], None]:
        def restart() -> None:
            store.kill()
            store.restart()

        return restart

    def _replace(self, kind: list[Process], end: Callable[[Process], Any]) -> None:
        """The one that has lived longest."""
        end(kind.pop(0))
        if kind is self._workers:
            self._workers.append(self._processes.worker())
            return
        port = self._ports.pop(0)
        self._ports.append(port)
        self._servers.append(self._processes.server(PORT=port))


@pytest.fixture
def town(own_stack: Stack, tmp_path: Path) -> Iterator[Town]:
    calm = {"JOB_FAULT_RATE": "0.05", "LOG_LEVEL": "warning", "DRAIN_SECONDS": "2"}
    with Processes(TEST_SETTINGS | own_stack.environment | calm, tmp_path) as processes:
        yield Town(own_stack, processes)


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
        self.workspaces: dict[str, str] = {}  # id → name
        self.jobs: dict[str, int] = {}  # id → number
        self.over = False

    @property
    def actor(self) -> Actor:
        """At either server."""
        return self._actor.at(random.choice(self._bases))

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

    async def make_workspaces(self) -> None:
        number = 0
        while not self.over:
            number += 1
            name = f"workspace {number}"
            try:
                made = await self.actor.post("/workspaces", {"projectId": self.project, "name": name})
            except AWAY:
                made = None
            if made is not None and made.status == 201:
                self.workspaces[made["id"]] = name
            assert made is None or made.status in (201, 503), made
            await asyncio.sleep(0.05)

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
    struck: Counter[str] = Counter()
    ends = asyncio.get_running_loop().time() + seconds
    while asyncio.get_running_loop().time() < ends:
        await asyncio.sleep(chance.uniform(*CALM_SECONDS))
        blow = chance.choice(sorted(town.blows()))
        struck[blow] += 1
        await asyncio.to_thread(town.blows()[blow])
    return struck


@pytest.mark.timeout(600)
async def test_a_bad_day_loses_nothing_and_doubles_nothing(
    town: Town, http: aiohttp.ClientSession, full: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    seed = int(os.environ.get("CHAOS_SEED", random.SystemRandom().randrange(1_000_000)))
    chance = random.Random(seed)
    await until_ready(http, town)
    alice = await Actor(http, town.bases[0], "Alice").register()
    bob = await Actor(http, town.bases[1], "Bob").register()
    project = await alice.make_project(bob)
    workspace = await alice.make_workspace(project)
    document = await make_document(alice, workspace)
    books = Books(alice, workspace, project, town.bases)
    editors = [await Editor(who, document).open() for who in (alice, bob)]
    writers = [Writer(who, workspace, town.bases) for who in (alice, bob)]

    async with Member(bob, workspace, town.bases) as reader, Member(alice, workspace, town.bases) as other:
        work = [
            asyncio.create_task(task)
            for task in (
                books.make_workspaces(),
                books.run_programs(),
                *(talk(writer, f"w{number}", books) for number, writer in enumerate(writers)),
            )
        ]
        typing = [
            asyncio.create_task(type_on(editor, letter, books, random.Random(seed + number)))
            for number, (editor, letter) in enumerate(zip(editors, "ab", strict=True))
        ]
        struck = await strike(town, chance, FULL_SECONDS if full else SHORT_SECONDS)
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
        print(f"\nchaos seed {seed}: {blows}\n  {len(said)} events, {typed} letters, {len(books.jobs)} jobs, "
              f"{len(books.workspaces)} workspaces acknowledged")  # fmt: skip
    await check_events([reader, other], said)
    await check_document(books, document, editors, typed)
    await check_workspaces(books)
    await check_jobs(books)


async def until_ready(http: aiohttp.ClientSession, town: Town) -> None:
    for base in town.bases:
        operator = Actor(http, base, "Operator")
        assert (await insist(partial(operator.get, "/health/ready"))).status == 200


async def check_events(members: list[Member], said: dict[str, Any]) -> None:
    for member in members:
        assert_ordered_and_once(member)
        if not member.gaps:
            assert [id for id in said if id not in set(member.ids)] == [], "lost"
        heard = dict(zip(member.ids, (event.get("change") for event in member.events), strict=True))
        assert {id: heard[id] for id in said if id in heard} == {id: said[id] for id in said if id in heard}


async def check_document(books: Books, document: str, editors: list[Editor], typed: list[int]) -> None:
    shown = await books.get(f"/documents/{document}/content")
    assert Counter(shown.body) == Counter({"a": typed[0], "b": typed[1]}), "each letter once"
    for editor in editors:
        await editor.reconnect()
        await editor.until(shown.body)


async def check_workspaces(books: Books) -> None:
    there = {each["id"]: each["name"] for each in await books.listed(f"/workspaces/project/{books.project}")}
    assert [name for id, name in books.workspaces.items() if there.get(id) != name] == []


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
