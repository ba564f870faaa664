"""Logs of Yjs updates to states and texts, and back; pure.

An update may come before what it builds on. Yjs keeps such a one aside, and ``Doc.get_update`` leaves it out:
so a state here is always the merged updates, whole (``settle``), never only what a Doc shows.

What is given must be well-formed: malformed updates make pycrdt raise, even PanicException, a BaseException.
"""

from bisect import bisect_right
from collections.abc import Iterable, Iterator, Mapping, Sequence
from difflib import SequenceMatcher
from typing import TypeAlias

from pycrdt import Doc, Text, get_update, merge_updates

from server.documents import wire

CONTENT = "content"  # the Y.Text that holds a document's text
GROUP = 64  # merge_updates is quadratic: a tree of groups is not
MOST_LINES = 2000  # difflib's worst case is quadratic too; beyond this, one edit replaces what differs
_STRIDE = 1 << 16
LiveDoc: TypeAlias = "Doc[Text]"
LiveText: TypeAlias = Text


def merge(updates: Sequence[bytes]) -> bytes:
    """One update that does what these do, in any order."""
    merged = list(updates) or [wire.NOTHING]
    while len(merged) > 1:
        merged = [merge_updates(*merged[at : at + GROUP]) for at in range(0, len(merged), GROUP)]
    return merged[0]


def load(updates: Sequence[bytes]) -> tuple[LiveDoc, Text]:
    """A live document, and its text."""
    doc: LiveDoc = Doc()
    text = doc.get(CONTENT, type=Text)
    if updates:
        doc.apply_update(merge(updates))
    return doc, text


def missing(update: bytes, doc: LiveDoc) -> bytes | None:
    """What of an applied update the document keeps aside, because what it builds on is not there yet."""
    vector = doc.get_state()
    rest = get_update(update, vector)
    if rest == wire.NOTHING:
        return None
    if not wire.adds_nothing(rest):
        return rest
    known = wire.state_vector(vector)
    if any(known.get(each.client, 0) < each.end for each in wire.deletions(rest)):
        return rest
    return None


def is_known(update: bytes, doc: LiveDoc) -> bool:
    """Whether the document has all of it: what a client that comes back offers is mostly that."""
    vector = doc.get_state()
    rest = get_update(update, vector)
    if not wire.adds_nothing(rest):
        return False
    deleted: dict[int, list[wire.Range]] = {}
    for each in wire.deletions(doc.get_update(vector)):
        deleted.setdefault(each.client, []).append(each)
    for ranges in deleted.values():
        ranges.sort()
    return all(_covered(each, deleted.get(each.client, [])) for each in wire.deletions(rest))


def _covered(wanted: wire.Range, ranges: Sequence[wire.Range]) -> bool:
    at = wanted.start
    for each in ranges[max(0, bisect_right(ranges, at, key=lambda each: each.start) - 1) :]:
        if at >= wanted.end or each.start > at:
            break
        at = max(at, each.end)
    return at >= wanted.end


def settle(updates: Sequence[bytes]) -> bytes:
    """The state after these updates: without the text that was deleted since, with what is kept aside."""
    merged = merge(updates)
    return _settled(load([merged])[0], merged)


def _settled(doc: LiveDoc, merged: bytes) -> bytes:
    aside = missing(merged, doc)
    return merge_updates(doc.get_update(), aside) if aside else doc.get_update()


def text_of(updates: Sequence[bytes]) -> str:
    return str(load(updates)[1])


def first(text: str) -> bytes:
    """The first update of a document with this text."""
    doc, content = load(())
    if text:
        content += text
    return doc.get_update()


def compact(
    state: bytes | None, log: Sequence[tuple[int, bytes]], named: Iterable[int]
) -> tuple[bytes, Mapping[int, str]]:
    """The state after a log that follows ``state``, and the text as it was at each of the ``named`` versions."""
    updates = [update for _, update in log]
    doc, text = load([state] if state else [])
    texts: dict[int, str] = {}
    applied = 0
    for version in sorted(named):
        until = bisect_right(log, version, key=lambda each: each[0])
        doc.apply_update(merge(updates[applied:until]))
        texts[version], applied = str(text), until
    doc.apply_update(merge(updates[applied:]))
    return _settled(doc, merge([state, *updates] if state else updates)), texts


def rewrite(state: bytes, text: str) -> bytes:
    """The smallest edit that makes the document's text this one, as an update; NOTHING where it is already."""
    doc, content = load([state])
    before = doc.get_state()
    old = str(content)
    if old == text:
        return wire.NOTHING
    with doc.transaction():
        for start, end, new in reversed(list(edits(old, text))):
            if end > start:
                del content[start:end]
            if new:
                content.insert(start, new)
    return doc.get_update(before)


def edits(old: str, new: str) -> Iterator[tuple[int, int, str]]:
    """Replacements (start, end, text) that make ``new`` of ``old``; offsets count UTF-8 bytes of ``old``."""
    head = _common_prefix(old, new)
    tail = _common_prefix(old[head:][::-1], new[head:][::-1])
    at = len(old[:head].encode())
    for was, becomes in _changes(old[head : len(old) - tail], new[head : len(new) - tail]):
        if was == becomes:
            at += len(was.encode())
            continue
        same = _common_prefix(was, becomes)
        same_end = _common_prefix(was[same:][::-1], becomes[same:][::-1])
        start = at + len(was[:same].encode())
        at += len(was.encode())
        yield start, at - len(was[len(was) - same_end :].encode()), becomes[same : len(becomes) - same_end]


def _changes(old: str, new: str) -> Iterator[tuple[str, str]]:
    """Pieces of both, in order, each pair equal or a change."""
    was, becomes = old.splitlines(keepends=True), new.splitlines(keepends=True)
    if max(len(was), len(becomes)) > MOST_LINES:
        yield old, new
        return
    for _, i, j, k, m in SequenceMatcher(None, was, becomes, autojunk=False).get_opcodes():
        yield "".join(was[i:j]), "".join(becomes[k:m])


def _common_prefix(a: str, b: str) -> int:
    """Length of what both begin with."""
    at = 0
    while at < min(len(a), len(b)) and a[at : at + _STRIDE] == b[at : at + _STRIDE]:
        at += _STRIDE
    end = min(at + _STRIDE, len(a), len(b))
    at = min(at, end)
    while at < end:
        middle = (at + end + 1) // 2
        if a[at:middle] == b[at:middle]:
            at = middle
        else:
            end = middle - 1
    return at


def taste(state: bytes, update: bytes) -> int:
    """Do with an update all that is done with it later; the size of the state it leads to."""
    doc, text = load([state])
    doc.apply_update(update)
    missing(update, doc)
    return len(str(text)) and len(doc.get_update())
