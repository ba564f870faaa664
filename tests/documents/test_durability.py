"""Durability: no acknowledged edit is lost and all editors converge, over processes, disconnects and kills."""

import asyncio
import contextlib
import random
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import aiohttp
import pytest

from server.devstack.stack import Stack
from tests.actors import Actor
from tests.conftest import TEST_SETTINGS, MakeServer
from tests.documents.editors import Editor, make_document
from tests.processes import Processes, Server
from tests.timeouts import WAIT_TIMEOUT_SECONDS

UNHURRIED = {"WS_FRAMES_PER_SECOND": "100000", "WS_BURST": "100000"}  # tests type faster than the rate limit
LETTERS = "abcdefghijklmnopqrstuvwxyzäöü𝄞é\n"


@pytest.fixture
def own_processes(own_stack: Stack, tmp_path: Path) -> Iterator[Processes]:
    with Processes(TEST_SETTINGS | own_stack.environment, tmp_path) as running:
        yield running


@contextlib.asynccontextmanager
async def typing(*editors: Editor) -> AsyncIterator[list[str]]:
    """Let all editors type marks until a failure; yield the marks that are acknowledged so far."""
    acknowledged: list[str] = []
    tasks = [asyncio.ensure_future(each.mark(f"{n}:", acknowledged)) for n, each in enumerate(editors)]
    yield acknowledged
    for task in tasks:
        task.cancel()
    await asyncio.wait(tasks)
    await asyncio.gather(*(each.socket.raw.close() for each in editors))
    await asyncio.sleep(0.5)  # the last edits may still be committed


async def amid_the_typing(acknowledged: list[str], *, after: int = 0) -> None:
    """Wait until more than ``after`` marks are acknowledged, and then for a random time."""
    async with asyncio.timeout(WAIT_TIMEOUT_SECONDS):
        while len(acknowledged) <= after:
            await asyncio.sleep(0.01)
    await asyncio.sleep(random.uniform(0, 0.7))


async def text_of(actor: Actor, document: str) -> str:
    """Read the text over REST, with retries until the server is available."""
    async with asyncio.timeout(WAIT_TIMEOUT_SECONDS):
        while True:
            with contextlib.suppress(aiohttp.ClientError, OSError):
                answer = await actor.get(f"/documents/{document}/content")
                if answer.status == 200:
                    return answer.body
            await asyncio.sleep(0.1)


async def test_two_editors_on_two_processes_converge_despite_disconnects(
    alice: Actor, bob: Actor, workspace: str, make_server: MakeServer, full: bool
) -> None:
    document = await make_document(alice, workspace)
    hers, his = await Editor(alice, document).open(), await Editor(bob.at(await make_server()), document).open()
    chance = random.Random(5)
    many = 2000 if full else 200
    typed = ["".join(chance.choice(LETTERS) for _ in range(many)) for _ in range(2)]
    async with asyncio.timeout(300 if full else 100):
        await asyncio.gather(
            hers.type_at_random(typed[0], seed=1, disconnects=0.02),
            his.type_at_random(typed[1], seed=2, disconnects=0.02),
        )
    text = await text_of(alice, document)
    assert Counter(text) == Counter("".join(typed))
    await asyncio.gather(hers.until(text), his.until(text))


async def test_killed_server_loses_no_acknowledged_edit(
    alice: Actor, bob: Actor, workspace: str, processes: Processes, full: bool
) -> None:
    document = await make_document(alice, workspace)
    doomed = processes.server(**UNHURRIED)
    for _ in range(5 if full else 1):
        base = doomed.base
        editors = [await Editor(alice.at(base), document).open() for _ in range(5)]
        async with typing(*editors, await Editor(bob, document).open()) as acknowledged:
            await amid_the_typing(acknowledged)
            doomed.kill()
            await asyncio.sleep(0.2)
        doomed = processes.server(PORT=base.rpartition(":")[2], **UNHURRIED)
        for actor in (alice, bob.at(doomed.base)):
            text = await text_of(actor, document)
            assert [mark for mark in acknowledged if mark not in text] == []


async def servers_of(processes: Processes, http: aiohttp.ClientSession) -> tuple[Actor, Actor, str, str]:
    """Two users on two processes, a document and its workspace."""
    servers: list[Server] = [processes.server(**UNHURRIED), processes.server(**UNHURRIED)]
    ada = await Actor(http, servers[0].base, "Ada").register()
    ben = await Actor(http, servers[1].base, "Ben").register()
    workspace = await ada.make_workspace(None, ben)
    return ada, ben, await make_document(ada, workspace), workspace


async def test_killed_postgresql_loses_no_acknowledged_edit(
    own_stack: Stack, own_processes: Processes, http: aiohttp.ClientSession, full: bool
) -> None:
    ada, ben, document, _ = await servers_of(own_processes, http)
    for _ in range(5 if full else 1):
        hers, his = await Editor(ada, document).open(), await Editor(ben, document).open()
        listener = await Editor(ben, document).open()
        async with typing(hers, his) as acknowledged:
            await amid_the_typing(acknowledged)
            await asyncio.to_thread(own_stack.postgres.kill)
            await asyncio.sleep(0.5)
        await asyncio.to_thread(own_stack.postgres.restart)
        text = await text_of(ada, document)
        assert [mark for mark in acknowledged if mark not in text] == []
        # An editor that stayed connected continues, and receives the edits that were committed last.
        await listener.deliver(listener.insert("back ", at=0))
        text = await text_of(ada, document)
        await listener.until(text)
        late = await Editor(ada, document).open()
        assert late.text == text
        await asyncio.gather(late.socket.close(), listener.socket.close())


async def test_killed_valkey_loses_no_edit_and_blocks_no_editor(
    own_stack: Stack, own_processes: Processes, http: aiohttp.ClientSession, full: bool
) -> None:
    ada, ben, document, _ = await servers_of(own_processes, http)
    for _ in range(5 if full else 1):
        hers, his = await Editor(ada, document).open(), await Editor(ben, document).open()
        listener = await Editor(ben, document).open()
        async with typing(hers, his) as acknowledged:
            await amid_the_typing(acknowledged)
            await asyncio.to_thread(own_stack.valkey.kill)
            await amid_the_typing(acknowledged, after=len(acknowledged))  # typing continues without Redis
        # Without Redis, the server finds the edits of other processes in PostgreSQL.
        text = await text_of(ada, document)
        assert [mark for mark in acknowledged if mark not in text] == []
        await listener.until(text)
        await asyncio.to_thread(own_stack.valkey.restart)
        assert await text_of(ben, document) == text
        await listener.socket.close()


async def test_cold_document_is_loaded_once_for_many_concurrent_opens(
    alice: Actor, workspace: str, make_server: MakeServer
) -> None:
    document = await make_document(alice, workspace, content="x" * 100_000)

    async def loads() -> float:
        metrics = (await alice.get("/metrics")).body
        return next(
            float(line.split()[1]) for line in metrics.splitlines() if line.startswith("documents_loaded_total")
        )

    before = await loads()
    sockets = await asyncio.gather(*(alice.connect() for _ in range(50)))
    opened = await asyncio.gather(*(socket.push("document:open", documentId=document) for socket in sockets))
    assert len({each["update"] for each in opened}) == 1
    assert await loads() == before + 1


def resident_megabytes(pid: int) -> float:
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * 4096 / 1e6


async def test_memory_is_freed_when_documents_are_closed(
    alice: Actor, workspace: str, processes: Processes, full: bool
) -> None:
    server = processes.server(**UNHURRIED)
    many = 1000 if full else 150
    documents = [
        await make_document(alice, workspace, path=f"{n}.txt", content="0123456789" * 10_000) for n in range(many)
    ]
    socket = await alice.at(server.base).connect()

    async def open_and_close(documents: list[str]) -> None:
        for document in documents:
            await socket.push("document:open", documentId=document)
            await socket.push("document:close", documentId=document)

    async def megabytes() -> float:
        await asyncio.sleep(0.5)
        return resident_megabytes(server.pid)

    await open_and_close(documents[:20])  # warm-up: memory that any working process keeps
    before = await megabytes()
    await open_and_close(documents)
    assert await megabytes() - before < many * 0.1 / 3, "less than a third of the size of the texts alone"
    metrics = (await alice.at(server.base).get("/metrics")).body
    assert "documents_open 0.0" in metrics
