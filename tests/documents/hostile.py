"""Hostile Yjs updates."""

import random
from collections.abc import Mapping

from pycrdt import Array, Doc, Map, Text, XmlElement, XmlFragment

from server.documents import wire

# Found by fuzzing pycrdt 0.14.13: each update is well-formed, and the last one crashes the process.
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


def nested_values(depth: int) -> bytes:
    """Return the update of a text with one value in it: lists nested to ``depth``."""
    value = b"\x75\x01" * depth + b"\x7e"
    return b"\x01\x01\x05\x00" + b"\x08\x01" + wire.prefixed(b"content") + b"\x01" + value + b"\x00"


def nested_types(depth: int) -> bytes:
    """Return the update of arrays nested to ``depth``; harmless until the outermost is deleted."""
    outermost = b"\x07\x01" + wire.prefixed(b"content") + b"\x00"
    inner = (b"\x07\x00\x05" + wire.number(n) + b"\x00" for n in range(depth - 1))
    return b"\x01" + wire.number(depth) + b"\x05\x00" + outermost + b"".join(inner) + b"\x00"


def typing(chance: random.Random, known: Mapping[int, int]) -> bytes:
    """Return text that continues where its client stopped, at contradictory places, with arbitrary deletions."""

    def somewhere() -> bytes:
        client = chance.choice(list(known))
        return wire.number(client) + wire.number(chance.randrange(known[client]))

    client = chance.choice([*known, chance.randrange(1, 1 << 20)])
    pieces = []
    for _ in range(chance.choice((1, 1, 2, 3))):
        origins = chance.choice((0, wire.HAS_LEFT, wire.HAS_RIGHT, wire.HAS_LEFT | wire.HAS_RIGHT))
        left = somewhere() if origins & wire.HAS_LEFT else b""
        right = somewhere() if origins & wire.HAS_RIGHT else b""
        parent = b"" if origins else b"\x01" + wire.prefixed(b"content")
        text = wire.prefixed(chance.choice(("a", "abc", "é𝄞")).encode())
        pieces.append(bytes([wire.STRING | origins]) + left + right + parent + text)
    begin = wire.number(client) + wire.number(known.get(client, 0))
    deleted = [somewhere()] if chance.random() < 0.4 else []
    ends = b"".join(map(_range, deleted))
    return b"\x01" + wire.number(len(pieces)) + begin + b"".join(pieces) + wire.number(len(deleted)) + ends


def _range(at: bytes) -> bytes:
    reader = wire.Reader(at)
    return wire.number(reader.number()) + b"\x01" + wire.number(reader.number()) + b"\x01"


def rich_updates(chance: random.Random) -> list[bytes]:
    """Return updates of rich-text editors: maps, arrays, XML and embedded types."""
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
