"""The binary messages of y-websocket clients (y-protocols), and the bits of Yjs's own format that we look into.

Pure, and bounded by what it is given: no number longer than 53 bits, no length beyond the end.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import NamedTuple

SYNC, AWARENESS, AUTH, QUERY_AWARENESS = 0, 1, 2, 3
STEP_1, STEP_2, UPDATE = 0, 1, 2
LARGEST_NUMBER = (1 << 53) - 1  # what JavaScript can count
LONGEST_NUMBER = 8  # bytes
MOST_ENTRIES = 1000  # in one awareness message
NOTHING = b"\x00\x00"  # the update without content
MOST_PIECES = 500  # of an update that is read here, piece by piece
KIND, HAS_KEY, HAS_RIGHT, HAS_LEFT = 0x1F, 0x20, 0x40, 0x80  # bits of a struct's first byte
STRING = 4
NUL = "\0"  # no text of ours has it
CONTENT = b"content"  # the Y.Text that holds a document's text


class Malformed(ValueError):
    """These bytes are not what they should be."""


class Entry(NamedTuple):
    """What one client says of itself: ``state`` is JSON text, ``null`` where the client has left."""

    client: int
    clock: int
    state: str


@dataclass(frozen=True)
class Sync:
    """``step`` is STEP_1 (``payload`` is a state vector), STEP_2 or UPDATE (it is an update)."""

    step: int
    payload: bytes


@dataclass(frozen=True)
class Awareness:
    entries: list[Entry]


@dataclass(frozen=True)
class QueryAwareness:
    pass


Message = Sync | Awareness | QueryAwareness | None


class Reader:
    def __init__(self, data: bytes) -> None:
        self._data = data
        self._at = 0

    @property
    def rest(self) -> int:
        return len(self._data) - self._at

    def number(self) -> int:
        """Raises Malformed beyond 53 bits."""
        value = shift = 0
        for byte in self._data[self._at : self._at + LONGEST_NUMBER]:
            self._at += 1
            value |= (byte & 0x7F) << shift
            if value > LARGEST_NUMBER:
                raise Malformed("Number exceeds 53 bits")
            if byte < 0x80:
                return value
            shift += 7
        raise Malformed(f"Number is truncated or longer than {LONGEST_NUMBER} bytes")

    def take(self, size: int) -> bytes:
        if size > self.rest:
            raise Malformed("Content is truncated")
        self._at += size
        return self._data[self._at - size : self._at]

    def bytes(self) -> bytes:
        return self.take(self.number())

    def text(self) -> str:
        try:
            return self.bytes().decode()
        except UnicodeDecodeError:
            raise Malformed("Text is not valid UTF-8") from None

    def end(self) -> None:
        if self.rest:
            raise Malformed("Unexpected data after the end")


def number(value: int) -> bytes:
    written = bytearray()
    while value > 0x7F:
        written.append(value & 0x7F | 0x80)
        value >>= 7
    written.append(value)
    return bytes(written)


def prefixed(content: bytes) -> bytes:
    return number(len(content)) + content


def parse(message: bytes) -> Message:
    """A client's message; None for one that asks nothing of us.

    Raises:
        Malformed: it is none.
    """
    reader = Reader(message)
    kind = reader.number()
    if kind == SYNC:
        step = reader.number()
        if step not in (STEP_1, STEP_2, UPDATE):
            raise Malformed("Unknown step of the sync protocol")
        sync = Sync(step, reader.bytes())
        reader.end()
        return sync
    if kind == AWARENESS:
        entries = parse_awareness(reader.bytes())
        reader.end()
        return Awareness(entries)
    if kind == QUERY_AWARENESS:
        return QueryAwareness()
    if kind == AUTH:
        return None
    raise Malformed("Unknown message type")


def parse_awareness(content: bytes) -> list[Entry]:
    reader = Reader(content)
    count = reader.number()
    if count > MOST_ENTRIES:
        raise Malformed(f"Message exceeds the maximum of {MOST_ENTRIES} awareness states")
    entries = [Entry(reader.number(), reader.number(), reader.text()) for _ in range(count)]
    reader.end()
    return entries


def awareness_content(entries: Iterable[Entry]) -> bytes:
    written = [number(entry.client) + number(entry.clock) + prefixed(entry.state.encode()) for entry in entries]
    return number(len(written)) + b"".join(written)


def awareness(content: bytes) -> bytes:
    return number(AWARENESS) + prefixed(content)


def sync(step: int, payload: bytes) -> bytes:
    return number(SYNC) + number(step) + prefixed(payload)


def refusal(reason: str) -> bytes:
    return number(AUTH) + number(0) + prefixed(reason.encode())


KEEPALIVE = awareness(awareness_content(()))


def state_vector(encoded: bytes) -> dict[int, int]:
    """Client → how many of its elements are there."""
    found = _numbers(encoded)
    if not found or len(found) != 1 + 2 * found[0]:
        raise Malformed("Count does not match the numbers that follow")
    return dict(zip(found[1::2], found[2::2], strict=True))


def _numbers(encoded: bytes) -> list[int]:
    """As ``Reader.number`` to the end, but in one go: this is done for every keystroke."""
    found = []
    value = shift = 0
    for byte in encoded:
        value |= (byte & 0x7F) << shift
        if byte > 0x7F and shift < 7 * (LONGEST_NUMBER - 1):
            shift += 7
        elif byte > 0x7F or value > LARGEST_NUMBER:
            raise Malformed("Number exceeds 53 bits")
        else:
            found.append(value)
            value = shift = 0
    if shift:
        raise Malformed("Number is truncated")
    return found


class Range(NamedTuple):
    """Elements of a client from ``start`` up to, and without, ``end``."""

    client: int
    start: int
    end: int


def deletions(update: bytes) -> Iterator[Range]:
    """What is deleted by an update (in Yjs's first format) that adds nothing."""
    reader = Reader(update)
    if reader.number() != 0:
        raise Malformed("Update does not only delete")
    yield from _deletions(reader)


def _deletions(reader: Reader) -> Iterator[Range]:
    for _ in range(_count(reader)):
        client = reader.number()
        for _ in range(_count(reader)):
            start = reader.number()
            yield Range(client, start, start + reader.number())


class Typing(NamedTuple):
    """What an editor of plain text sends: text of one client, and deletions; few of both."""

    client: int | None  # None: it only deletes
    start: int  # the number of its first element
    builds_on: list[tuple[int, int]]
    """Client and how many of its elements there must be."""


def typing(update: bytes) -> Typing | None:
    """The update read as such; None where it is anything else, has NUL in its text, or more than MOST_PIECES.

    No values and no types: these can be nested until whoever reads or deletes them runs out of stack.
    """
    reader = Reader(update)
    try:
        clients = reader.number()
        typed = _typed(reader) if clients == 1 else Typing(None, 0, [])
        if clients > 1 or typed is None:
            return None
        typed.builds_on.extend((each.client, each.end) for each in islice(_deletions(reader), MOST_PIECES))
        reader.end()
    except Malformed:
        return None
    return typed


def _typed(reader: Reader) -> Typing | None:
    pieces, client, start = reader.number(), reader.number(), reader.number()
    builds_on: list[tuple[int, int]] = []
    if pieces > MOST_PIECES:
        return None
    end = start
    for _ in range(pieces):
        found: list[tuple[int, int]] = []
        length = _text(reader, found)
        if length is None or any(of == client and until > end for of, until in found):
            return None
        builds_on += [(of, until) for of, until in found if of != client or until <= start]
        end += length
    return Typing(client, start, builds_on)


def _text(reader: Reader, builds_on: list[tuple[int, int]]) -> int | None:
    """Reads a struct of an update, if it is text: how many elements it has, or None."""
    (info,) = reader.take(1)
    if info & HAS_KEY or info & KIND != STRING:
        return None
    origins = (info & HAS_LEFT, info & HAS_RIGHT)
    builds_on += [(reader.number(), reader.number() + 1) for is_there in origins if is_there]
    if not any(origins) and not (reader.number() == 1 and reader.bytes() == CONTENT):
        return None
    text = reader.text()
    return None if NUL in text else len(text.encode("utf-16-le")) // 2 or None


def everything(vector: dict[int, int]) -> bytes:
    """The update that deletes all of a document which is so far."""
    ranges = (number(client) + b"\x01\x00" + number(end) for client, end in vector.items())
    return b"\x00" + number(len(vector)) + b"".join(ranges)


def adds_nothing(update: bytes) -> bool:
    """Whether an update only deletes, if anything."""
    return update[:1] == b"\x00"


def _count(reader: Reader) -> int:
    count = reader.number()
    if count > reader.rest:  # each takes a byte at least
        raise Malformed("Content is truncated")
    return count
