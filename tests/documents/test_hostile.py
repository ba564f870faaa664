"""Updates that are meant to harm. The servers are processes of their own: what crashes pycrdt would crash the test."""

import asyncio
import random
import subprocess
import sys
from base64 import b64encode

import pytest
from pycrdt import Array, Doc, Map, Text, XmlElement, XmlFragment

from tests.actors import Actor
from tests.documents.editors import Editor, make_document
from tests.processes import Processes
from tests.sockets import Refused

UNHURRIED = {"WS_FRAMES_PER_SECOND": "100000", "WS_BURST": "100000"}
# Found by fuzzing pycrdt 0.14.13: each update is well-formed, and the last one ends the process.
LETHAL = [
    [
        "01019dd5e7b40449080101610175037c3f800000770173740362696e019dd5e7b404010004",
        "010c9dd5e7b404002101016d01740100032801016d026b31017601016175057c3f8000007c403200007e78770178a19dd5e7b404000100"
        "03080101610175037c3f800000770173740362696e040107636f6e74656e7406616263616263889dd5e7b404090175037c3f8000007701"
        "73740362696e2801016d026b32017601016175057c3f8000007c402000007e78770178889dd5e7b404100175037c3f8000007701737403"
        "62696ea79dd5e7b404050204009dd5e7b4041303737562019dd5e7b4040200040504",
        "01019dd5e7b404112801016d026b32017601016175057c3f8000007c402000007e78770178019dd5e7b4040100ffffffffffffffffff01"
        "04",
        "01019dd5e7b40409b10101610175037c3f800000770173740362696e019dd5e7b404010004",
    ],
    [
        "010df7bec6a70a322801016d026b30017601016175057c3f8000007c402000007e787701782101016d01740100032801016d026b320176"
        "01016175057c3f8000007c402000007e78770178a1f7bec6a70a01010003080101610275037c3f800000770173740362696e75037c3f80"
        "0000770173740362696e070101780301702800f7bec6a70a0c0161017701620700f7bec6a70a0c060400f7bec6a70a0e0174a7f7bec6a7"
        "0a06020400f7bec6a70a100373756201f7bec6a70a0201040604",
        "010df7bec6a70a002801016d026b30017601016175057c3f8000007c402000007e787701782101016d01740100032801016d026b320176"
        "01016175057c3f8000007c402000007e78770178a1f7bec6a70a01010003080101610275037c3f800000770173740362696e75037c3f80"
        "0000770173740362696e070101780301702800f7bec6a70a0c0161017701620700f7bec6a70a0c060400f7bec6a70a0e0174a7f7bec6a7"
        "0a06020400f7bec6a70a100373756201f7bec6a70a0201040604",
        "0101f7bec6a70a0ab10101610175037c3f800000770173740362696e01f7bec6a70a010104",
    ],
]
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
async def test_what_crashes_pycrdt_does_not_crash_us(
    alice: Actor, bob: Actor, workspace: str, processes: Processes, updates: list[str]
) -> None:
    ended = await asyncio.to_thread(subprocess.run, [sys.executable, "-c", APPLY, *updates], check=False)
    assert ended.returncode < 0, "pycrdt survives this now: look for another sequence"
    server = processes.server()
    document = await make_document(alice, workspace)
    hers, his = await Editor(alice.at(server.base), document).open(), await Editor(bob.at(server.base), document).open()
    for update in updates[:-1]:
        await hers.socket.push("document:update", documentId=document, update=_coded(update))
    with pytest.raises(Refused) as refused:
        await hers.socket.push("document:update", documentId=document, update=_coded(updates[-1]))
    assert refused.value.code == "validation_failed"
    await his.type("alive")
    assert (await bob.get(f"/documents/{document}/content")).body.count("alive") == 1


def _coded(update: str) -> str:
    return b64encode(bytes.fromhex(update)).decode()


def rich_updates(chance: random.Random) -> list[bytes]:
    """What editors of all kinds send."""
    doc: Doc = Doc(client_id=chance.randrange(1, 1 << 32))
    text, items = doc.get("content", type=Text), doc.get("a", type=Array)
    values, tree = doc.get("m", type=Map), doc.get("x", type=XmlFragment)
    changes = (
        lambda: text.insert(chance.randrange(len(text) + 1), "abc"),
        lambda: text.clear() if chance.random() < 0.2 else text.insert(0, "é"),
        lambda: values.__setitem__(f"k{chance.randrange(3)}", {"a": [1, 2.5, None, True, "x"]}),
        lambda: items.append([1, "s", b"bin"]),
        lambda: tree.children.append(XmlElement("p", {"a": "b"}, ["t"])),
        lambda: values.__setitem__("t", Text("sub")),
    )
    updates = []
    for _ in range(12):
        before = doc.get_state()
        chance.choice(changes)()
        updates.append(doc.get_update(before))
    return [*updates, doc.get_update()]


def mutated(update: bytes, chance: random.Random) -> bytes:
    raw = bytearray(update)
    for _ in range(chance.choice((1, 1, 1, 2, 4))):
        at = chance.randrange(len(raw) + 1)
        match chance.randrange(5):
            case 0 if raw:
                raw[at % len(raw)] = chance.randrange(256)
            case 1 if raw:
                raw[at % len(raw)] ^= 1 << chance.randrange(8)
            case 2:
                raw[at:at] = chance.choice((b"\xff\xff\xff\xff\x0f", b"\xff" * 9 + b"\x01", b"\xff\xff\x7f"))
            case 3:
                del raw[at : at + chance.randrange(4)]
            case _:
                del raw[at:]
    return bytes(raw)


@pytest.mark.timeout(600)
async def test_mutated_updates_are_answered_and_harm_nobody_else(
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
        except Refused as refused:
            answers[refused.code] += 1  # any other is none of these
        await neighbour.type(".")
    assert all(answers.values()), answers
    await witness.type("unharmed")
    text = (await bob.get(f"/documents/{target}/content")).body
    assert "unharmed" in text
    assert (await Editor(bob.at(server.base), target).open()).text == text
    assert (await bob.get(f"/documents/{beside}/content")).body == neighbour.text == "." * len(neighbour.text)
