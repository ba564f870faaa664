"""Logs of Yjs updates to states and texts, and back; pure.

An update may come before what it builds on. Yjs keeps such a one aside, and ``Doc.get_update`` leaves it out:
so a state here is always the merged updates, whole (``settle``), never only what a Doc shows.

What is given must be well-formed: malformed updates make pycrdt raise, even PanicException, a BaseException.
"""

from bisect import bisect_left, bisect_right
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from difflib import SequenceMatcher
from typing import TypeAlias

from pycrdt import Doc, Text, get_update, merge_updates

from server.documents import wire

CONTENT = wire.CONTENT.decode()
GROUP = 64  # merge_updates is quadratic: a tree of groups is not
MOST_ALIKE = 16  # a line that is there more often is no landmark: an empty one, or a brace
MOST_STEPS = 10_000_000  # difflib is cubic in its worst case; beyond this, one edit replaces what differs
SHORT_BYTES = 1 << 10  # of what is looked at piece by piece, rather than by pycrdt as a whole
LIGHT_BYTES, LIGHT_UPDATES = 64 << 10, 200  # of a log that is worked on at once: a few milliseconds
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


def is_light(updates: Sequence[bytes]) -> bool:
    """Whether a log is nothing but typing, and little of it: that harms nobody, and takes no time."""
    if len(updates) > LIGHT_UPDATES or sum(map(len, updates)) > LIGHT_BYTES:
        return False
    return all(wire.typing(update) is not None for update in updates)


def missing(update: bytes, doc: LiveDoc) -> bytes | None:
    """What of an applied update the document keeps aside, because what it builds on is not there yet."""
    vector = doc.get_state()
    rest = get_update(update, vector)
    if rest == wire.NOTHING:
        return None
    if not wire.adds_nothing(rest):
        return rest
    if len(rest) > SHORT_BYTES:
        return None if has_deleted(rest, deletions(doc)) else rest
    known = wire.state_vector(vector)
    if any(known.get(each.client, 0) < each.end for each in wire.deletions(rest)):
        return rest
    return None


def deletions(doc: LiveDoc) -> bytes:
    """The update that deletes what is deleted in a document."""
    return merge_updates(doc.get_update(doc.get_state()))


def has_deleted(update: bytes, deleted: bytes) -> bool:
    """Whether an update that adds nothing deletes no more than ``deletions`` says.

    What pycrdt has merged is sorted, and as short as can be: so the same twice, where nothing is new.
    """
    return merge_updates(deleted, update) == deleted


def is_known(update: bytes, doc: LiveDoc) -> bool:
    """Whether the document has all of it: what a client that comes back offers is mostly that."""
    rest = get_update(update, doc.get_state())
    return wire.adds_nothing(rest) and has_deleted(rest, deletions(doc))


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


def revive(log: Sequence[bytes]) -> bytes:
    """As ``settle``, but an update that pycrdt chokes on now, though it did not then, is left out."""
    try:
        return settle(log)
    except BaseException:  # noqa: BLE001 - PanicException is one; we are in a process of our own
        doc, _ = load(())
        fit = [update for update in log if _fits(update, doc)]
        return _settled(doc, merge(fit))


def _fits(update: bytes, doc: LiveDoc) -> bool:
    try:
        doc.apply_update(update)
    except BaseException:  # noqa: BLE001 - as above
        return False
    return True


def rewrite(state: bytes, text: str) -> bytes:
    """The smallest edit that makes the document's text this one, as an update; NOTHING where it is already."""
    doc, content = load([state])
    before = doc.get_state()
    old = str(content)
    if old == text:
        return wire.NOTHING
    embeds = _embeds(content)
    with doc.transaction():
        for start, end, new in reversed(list(edits(old, text))):
            first = start + bisect_right(embeds, start)
            if end > start:
                del content[first : end + bisect_left(embeds, end)]
            if new:
                content.insert(first, new)
    return doc.get_update(before)


def _embeds(content: LiveText) -> list[int]:
    """Where in the text things are that are no text, but count as one byte each: pictures, say."""
    at, found = 0, []
    for piece, _ in content.diff():
        if isinstance(piece, str):
            at += len(piece.encode())
        else:
            found.append(at)
    return found


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
    times = Counter(becomes)
    alike = sum(times[line] for line in was if times[line] <= MOST_ALIKE)
    if alike * min(len(was), len(becomes)) > MOST_STEPS:
        yield old, new
        return
    matcher = SequenceMatcher(lambda line: times[line] > MOST_ALIKE, was, becomes, autojunk=False)
    for _, i, j, k, m in matcher.get_opcodes():
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


def taste(state: bytes, update: bytes) -> bytes:
    """Do with an update all that can be done with it later; the update as it is stored, NOTHING where that is known.

    Also delete all there is: types that are nested deeply do no harm before.
    """
    update = merge_updates(update)
    doc, text = load([state])
    if is_known(update, doc):
        return wire.NOTHING
    before = str(text).count(wire.NUL)
    doc.apply_update(update)
    missing(update, doc)
    if str(text).count(wire.NUL) > before:
        raise ValueError("NUL characters are not allowed")
    for later in ([doc.get_update()], [state, update]):
        again, text = load(later)
        again.apply_update(wire.everything(wire.state_vector(again.get_state())))
        str(text), again.get_update()
    return update
