"""The binary protocol: written messages are read back, and all other input is rejected quickly."""

import time

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pycrdt import Doc, Map, Text

from server.documents import wire

NUMBERS = st.integers(0, wire.LARGEST_NUMBER)
ENTRIES = st.lists(st.builds(wire.Entry, NUMBERS, NUMBERS, st.text(max_size=20)), max_size=5)


@given(st.sampled_from([wire.STEP_1, wire.STEP_2, wire.UPDATE]), st.binary(max_size=300))
def test_sync_message_is_read_as_it_was_written(step: int, payload: bytes) -> None:
    assert wire.parse(wire.sync(step, payload)) == wire.Sync(step, payload)


@given(ENTRIES)
def test_awareness_is_read_as_it_was_written(entries: list[wire.Entry]) -> None:
    message = wire.awareness(wire.awareness_content(entries))
    assert wire.parse(message) == wire.Awareness(entries)


@given(st.binary(max_size=200))
def test_any_input_is_read_or_rejected(message: bytes) -> None:
    for read in (wire.parse, wire.parse_awareness, wire.state_vector, wire.typing, lambda m: list(wire.deletions(m))):
        try:
            read(message)
        except wire.Malformed:
            continue


@given(ENTRIES.filter(bool), st.data())
def test_truncated_message_is_rejected(entries: list[wire.Entry], data: st.DataObject) -> None:
    message = wire.awareness(wire.awareness_content(entries))
    with pytest.raises(wire.Malformed):
        wire.parse(message[: data.draw(st.integers(0, len(message) - 1))])


def test_hostile_numbers_are_rejected_within_two_seconds() -> None:
    started = time.thread_time()
    for hostile in (b"\x80" * 1_000_000, b"\xff" * 1_000_000, b"\x01\xff\xff\xff\xff\x0f" * 100_000):
        for read in (wire.parse, wire.parse_awareness, wire.state_vector):
            with pytest.raises(wire.Malformed):
                read(hostile)
    assert time.thread_time() - started < 2


def test_keepalive_is_an_empty_awareness() -> None:
    assert wire.KEEPALIVE == b"\x01\x01\x00"
    assert wire.parse(wire.KEEPALIVE) == wire.Awareness([])


def test_typing_is_distinguished_from_other_updates() -> None:
    doc: Doc = Doc(client_id=5)
    text = doc.get("content", type=Text)
    text += "héllo"
    assert wire.typing(doc.get_update()) == wire.Typing(5, 0, [])
    before = doc.get_state()
    text.insert(1, "𝄞")
    del text[0:1]
    assert wire.typing(doc.get_update(before)) == wire.Typing(5, 5, [(5, 1), (5, 2), (5, 1)])
    before = doc.get_state()
    doc.get("values", type=Map)["key"] = [1]
    assert wire.typing(doc.get_update(before)) is None
    assert wire.typing(wire.everything({5: 7})) == wire.Typing(None, 0, [(5, 7)])
    assert wire.typing(wire.NOTHING + b"x") is None
    before = doc.get_state()
    text += "a\0b"
    assert wire.typing(doc.get_update(before)) is None


def test_parsed_entries_and_pieces_are_bounded() -> None:
    entries = [wire.Entry(client, 1, "{}") for client in range(wire.MOST_ENTRIES + 1)]
    assert len(wire.parse_awareness(wire.awareness_content(entries[1:]))) == wire.MOST_ENTRIES
    with pytest.raises(wire.Malformed):
        wire.parse_awareness(wire.awareness_content(entries))
    for most, is_typing in ((wire.MOST_PIECES, True), (wire.MOST_PIECES + 1, False)):
        deleted = b"\x00\x01\x05" + wire.number(most) + b"".join(wire.number(2 * n) + b"\x01" for n in range(most))
        typed = b"\x01" + wire.number(most) + b"\x05\x00" + b"\x04\x01\x07content\x01x" * most + b"\x00"
        assert [wire.typing(update) is not None for update in (deleted, typed)] == [is_typing, is_typing]


@given(st.dictionaries(NUMBERS, NUMBERS, max_size=20))
def test_state_vector_is_read_as_it_was_written(vector: dict[int, int]) -> None:
    written = wire.number(len(vector)) + b"".join(wire.number(each) for pair in vector.items() for each in pair)
    assert wire.state_vector(written) == vector
    for broken in (written + b"\x00", written[:-1], b"\xff" * 7 + b"\x7f" + written):
        with pytest.raises(wire.Malformed):
            wire.state_vector(broken)
