"""Hostile updates. The servers are separate processes, because a crash of pycrdt would end the test too."""

import asyncio
import random
import subprocess
import sys
from base64 import b64encode

import pytest

from server.documents import wire
from server.documents.updates import first
from tests.actors import Actor
from tests.documents.editors import Editor, make_document
from tests.documents.hostile import LETHAL, mutated, nested_types, nested_values, rich_updates
from tests.documents.test_yjs import closed_with, compared, raw_socket
from tests.processes import Processes
from tests.sockets import ErrorReply

UNHURRIED = {"WS_FRAMES_PER_SECOND": "100000", "WS_BURST": "100000"}
APPLY = """
import sys
from pycrdt import Doc, Text
doc = Doc(); text = doc.get("content", type=Text)
for update in sys.argv[1:]:
    try:
        doc.apply_update(bytes.fromhex(update))
    except BaseException:
        pass
    str(text); doc.get_update()
"""


@pytest.mark.parametrize("updates", LETHAL)
async def test_update_that_crashes_pycrdt_does_not_crash_the_server(
    alice: Actor, bob: Actor, workspace: str, processes: Processes, updates: list[str]
) -> None:
    ended = await asyncio.to_thread(subprocess.run, [sys.executable, "-c", APPLY, *updates], check=False)
    assert ended.returncode < 0, "pycrdt survives this now: look for another sequence"
    server = processes.server()
    document = await make_document(alice, workspace)
    hers, his = await Editor(alice.at(server.base), document).open(), await Editor(bob.at(server.base), document).open()
    for update in updates[:-1]:
        await hers.socket.push("document:update", documentId=document, update=_coded(update))
    with pytest.raises(ErrorReply) as refused:
        await hers.socket.push("document:update", documentId=document, update=_coded(updates[-1]))
    assert refused.value.code == "validation_failed"
    await his.type("alive")
    assert (await bob.get(f"/documents/{document}/content")).body.count("alive") == 1


async def test_servers_survive_concurrent_updates_that_crash_pycrdt_together(
    alice: Actor, bob: Actor, workspace: str, processes: Processes
) -> None:
    one, two = processes.server(), processes.server()
    for number, elsewhere in enumerate((one, two)):
        document = await make_document(alice, workspace, path=f"{number}")
        hers = await Editor(alice.at(one.base), document).open()
        his = await Editor(bob.at(elsewhere.base), document).open()
        for update in LETHAL[0][:-2]:
            await hers.socket.push("document:update", documentId=document, update=_coded(update))
        answers = await asyncio.gather(
            *(
                editor.socket.push("document:update", documentId=document, update=_coded(update))
                for editor, update in zip((hers, his), LETHAL[0][-2:], strict=True)
            ),
            return_exceptions=True,
        )
        assert all(isinstance(answer, dict | ErrorReply) for answer in answers), answers
        for base in (one.base, two.base):
            late = await bob.at(base).connect()  # a raw client: applying both updates would crash the test
            await late.push("document:open", documentId=document)
            await late.push("document:update", documentId=document, update=b64encode(first("alive")).decode())


@pytest.mark.parametrize("bomb", [nested_values(100_000), nested_types(100_000)], ids=["values", "types"])
async def test_nesting_that_exhausts_the_stack_closes_only_that_socket(
    alice: Actor, bob: Actor, workspace: str, processes: Processes, bomb: bytes
) -> None:
    server = processes.server()
    document = await make_document(alice, workspace)
    his = await Editor(bob.at(server.base), document).open()
    for step in (wire.UPDATE, wire.STEP_2):
        socket = await raw_socket(alice.at(server.base), document)
        await socket.send_bytes(wire.sync(step, bomb))
        assert await closed_with(socket) == 4400
    await his.type("alive")


async def test_hostile_updates_from_many_sockets_do_not_affect_other_documents(
    alice: Actor, bob: Actor, workspace: str, processes: Processes, full: bool
) -> None:
    server = processes.server(**UNHURRIED)
    document = await make_document(alice, workspace, path="target", content="x")
    beside = await Editor(bob.at(server.base), await make_document(alice, workspace, path="beside")).open()

    async def attack(seed: int) -> None:
        chance = random.Random(seed)
        for _ in range(50 if full else 4):
            socket = await raw_socket(alice.at(server.base), document)
            for _ in range(5):
                if not socket.closed:
                    await socket.send_bytes(
                        wire.sync(wire.UPDATE, mutated(chance.choice(rich_updates(chance)), chance))
                    )
            await compared(socket)  # or the socket is closed
            await socket.close()

    attacks = [asyncio.ensure_future(attack(seed)) for seed in range(4)]
    while not all(attack.done() for attack in attacks):
        await beside.type(".")
    await asyncio.gather(*attacks)
    late = await Editor(bob.at(server.base), document).open()
    await late.type("unharmed")
    assert (await bob.get(f"/documents/{document}/content")).body == late.text


def _coded(update: str) -> str:
    return b64encode(bytes.fromhex(update)).decode()


@pytest.mark.timeout(600)
async def test_mutated_updates_are_acknowledged_or_rejected_and_affect_no_other_editor(
    alice: Actor, bob: Actor, workspace: str, processes: Processes, full: bool
) -> None:
    server = processes.server(**UNHURRIED)
    target = await make_document(alice, workspace, path="target", content="x")
    beside = await make_document(alice, workspace, path="beside")
    attacker = await Editor(alice.at(server.base), target).open()
    witness, neighbour = [await Editor(bob.at(server.base), each).open() for each in (target, beside)]
    chance = random.Random(7)
    answers = {"accepted": 0, "validation_failed": 0}
    for _ in range(1000 if full else 100):
        update = mutated(chance.choice(rich_updates(chance)), chance)
        try:
            await attacker.send(update)
            answers["accepted"] += 1
        except ErrorReply as refused:
            answers[refused.code] += 1  # any other code raises KeyError
        await neighbour.type(".")
    assert all(answers.values()), answers
    await witness.type("unharmed")
    text = (await bob.get(f"/documents/{target}/content")).body
    assert "unharmed" in text
    assert (await Editor(bob.at(server.base), target).open()).text == text
    assert (await bob.get(f"/documents/{beside}/content")).body == neighbour.text == "." * len(neighbour.text)
