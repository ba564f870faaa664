"""Logs, states and texts: nothing is lost on the way, whatever the order."""

import random
import time

from hypothesis import given
from hypothesis import strategies as st
from pycrdt import Doc, Text

from server.documents import updates


class Editor:
    """Types at random places and remembers each keystroke's update."""

    def __init__(self, seed: int = 1) -> None:
        self.random = random.Random(seed)
        self.doc: Doc[Text] = Doc(client_id=seed)
        self.text = self.doc.get(updates.CONTENT, type=Text)
        self.log: list[bytes] = []

    def type(self, times: int, piece: str = "é𝄞x") -> None:
        for _ in range(times):
            before = self.doc.get_state()
            whole = str(self.text)
            at = len(whole[: self.random.randrange(len(whole) + 1)].encode())
            if whole and self.random.random() < 0.2:
                start = self.random.randrange(len(whole))
                at = len(whole[:start].encode())
                del self.text[at : at + len(whole[start].encode())]
            else:
                self.text.insert(at, piece)
            self.log.append(self.doc.get_update(before))


def test_a_log_merged_in_any_order_gives_the_same_text() -> None:
    editor = Editor()
    editor.type(300)
    shuffled = random.Random(2).sample(editor.log, len(editor.log))
    assert updates.text_of(shuffled) == updates.text_of([updates.settle(shuffled)]) == str(editor.text)


def test_a_state_keeps_what_came_before_the_things_it_builds_on() -> None:
    editor = Editor()
    editor.type(50)
    late, rest = editor.log[3], editor.log[:3] + editor.log[4:]
    state = updates.settle(rest)
    assert updates.text_of([state]) != str(editor.text)
    assert updates.text_of([state, late]) == str(editor.text)


def test_a_deletion_that_comes_first_is_kept() -> None:
    editor = Editor()
    editor.text += "hello world"
    typed = editor.doc.get_update()
    before = editor.doc.get_state()
    del editor.text[0:6]
    deleted = editor.doc.get_update(before)
    assert updates.text_of([updates.settle([deleted]), typed]) == "world"


def test_a_compacted_log_remembers_the_text_of_every_named_version() -> None:
    editor = Editor()
    texts = {}
    for version in range(1, 41):
        editor.type(1)
        texts[version] = str(editor.text)
    log = list(enumerate(editor.log, start=1))
    state, kept = updates.compact(None, log[:20], [7, 20])
    assert kept == {7: texts[7], 20: texts[20]}
    state, kept = updates.compact(state, log[20:], [20, 33])
    assert kept == {20: texts[20], 33: texts[33]}
    assert updates.text_of([state]) == texts[40]


def test_deleted_text_does_not_stay_in_the_state() -> None:
    editor = Editor()
    for _ in range(100):
        for change in (lambda: editor.text.insert(0, "x" * 1000), lambda: editor.text.clear()):
            before = editor.doc.get_state()
            change()
            editor.log.append(editor.doc.get_update(before))
    assert len(updates.merge(editor.log)) > 100_000
    assert len(updates.settle(editor.log)) < 10_000


def test_ten_thousand_updates_are_merged_in_a_moment() -> None:
    editor = Editor()
    editor.type(1000, "x")
    many = editor.log * 10
    started = time.perf_counter()
    updates.merge(many)
    assert time.perf_counter() - started < 2


@given(st.text(max_size=60), st.text(max_size=60))
def test_a_rewritten_document_has_the_new_text(old: str, new: str) -> None:
    state = updates.first(old)
    assert updates.text_of([state, updates.rewrite(state, new)]) == new


@given(st.lists(st.sampled_from(["a\n", "é\n", "𝄞b\n", "same\n"])), st.lists(st.sampled_from(["a\n", "é\n", "c\n"])))
def test_a_document_rewritten_line_by_line_has_the_new_text(old: list[str], new: list[str]) -> None:
    state = updates.first("".join(old))
    assert updates.text_of([state, updates.rewrite(state, "".join(new))]) == "".join(new)


def test_a_rewrite_touches_only_what_differs() -> None:
    old = "".join(f"line {n}\n" for n in range(500))
    new = old.replace("line 100\n", "line one hundred\n").replace("line 400\n", "")
    assert sum(end - start + len(text) for start, end, text in updates.edits(old, new)) < 50
    assert len(updates.rewrite(updates.first(old), new)) < 200


def test_rewriting_a_large_text_takes_no_longer_than_reading_it_does() -> None:
    old = "x" * 5_000_000
    new = old[:2_500_000] + "y" + old[2_500_000:]
    assert list(updates.edits(old, new)) == [(2_500_000, 2_500_000, "y")]
