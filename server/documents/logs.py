"""Documents as PostgreSQL has them: their logs, read and written without a live document."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import NamedTuple
from uuid import UUID

from asyncpg import Record

from server.deadline import paused, remaining
from server.documents import store, updates, wire
from server.documents.commits import PAUSE_SECONDS
from server.documents.live import MOST_STATE_BYTES
from server.documents.workshop import Failed, Workshop
from server.errors import Forbidden, NotFound, TooLarge, Unavailable, store_timed_out
from server.postgres import Executor

PAGE_UPDATES = 2000  # of a log, read at once
PAGE_BYTES = 4 << 20  # or one update that is larger
COMPACT_UPDATES = 1000  # a log is long with so many updates
COMPACT_BYTES = 2 << 20  # or with so many bytes of them
WRITE_AGAIN = 3  # times, where others edit what is written over
WRITE_SECONDS = 0.5  # at least, of what is left of the request's budget
READ_AGAIN = 5  # times, where compaction takes a log away under its reader
Accepts = Callable[[int, int], bool]  # a version and the document's revision


@dataclass(frozen=True)
class Log:
    """A snapshot (None for none), and what came after it."""

    document: UUID
    revision: int  # of the document, when it was read
    kept_version: int
    state: bytes | None
    tail: list[Record]

    @property
    def version(self) -> int:
        return int(self.tail[-1]["version"]) if self.tail else self.kept_version

    @property
    def updates(self) -> list[bytes]:
        tail = [row["data"] for row in self.tail]
        return tail if self.state is None else [self.state, *tail]

    @property
    def bytes(self) -> int:
        return sum(map(len, self.updates))

    @property
    def is_long(self) -> bool:
        return is_long(len(self.tail), sum(len(row["data"]) for row in self.tail))

    def until(self, version: int) -> "Log":
        """The log as it was at one of its versions."""
        return replace(self, tail=[row for row in self.tail if row["version"] <= version])


def is_long(updates: int, bytes: int) -> bool:
    return updates >= COMPACT_UPDATES or bytes >= COMPACT_BYTES


async def read_log(db: Executor, document: UUID, *, until: int | None = None) -> Log:
    """The log of a document, as it is now or was at a version.

    Raises:
        NotFound: no such document, or it reaches no longer back to that version.
    """
    for _ in range(READ_AGAIN):
        head = await store.read_snapshot(db, document=document)
        if head is None:
            raise NotFound("Document not found")
        newest = head["version"] if until is None else until
        if head["kept_version"] > newest:
            raise NotFound("Version not found")
        tail = await read_tail(db, document, after=head["kept_version"], until=newest)
        if tail is not None:
            return Log(document, head["revision"], head["kept_version"], head["state"], tail)
    raise Unavailable("Document changes too fast")


async def read_tail(db: Executor, document: UUID, *, after: int, until: int) -> list[Record] | None:
    """All updates after a version up to another; None where the log does not have them all (any more)."""
    tail: list[Record] = []
    while after < until:
        limit = min(PAGE_UPDATES, until - after)
        page = await store.read_log(db, document=document, after=after, limit=limit, limit_bytes=PAGE_BYTES)
        if not page or page[0]["version"] != after + 1 or page[-1]["version"] != after + len(page):
            return None
        tail += page
        after += len(page)
    return tail


async def text_now(db: Executor, workshop: Workshop, document: UUID) -> tuple[str, int]:
    """The text, and its version.

    Raises:
        NotFound: no such document.
    """
    log = await read_log(db, document)
    with paused():
        return await text_of(log, workshop), log.version


async def text_of(log: Log, workshop: Workshop) -> str:
    try:
        return await workshop.do(updates.text_of, log.updates, on=log.updates)
    except Failed:
        return await workshop.do(updates.text_of, [await workshop.revive(log.updates)])


async def read_version(db: Executor, *, document: UUID, version: int) -> tuple[Record, Log | None]:
    """A named version; with the log that its text is to be had of, where that is not kept beside it.

    Raises:
        NotFound: there is none.
    """
    found = await store.read_version(db, document=document, version=version)
    if found is None:
        raise NotFound("Version not found")
    if found["content"] is not None:
        return found, None
    try:
        return found, await read_log(db, document, until=version)
    except NotFound:
        # The log was shortened since; then the text was kept.
        found = await store.read_version(db, document=document, version=version)
        if found is None or found["content"] is None:
            raise
        return found, None


class Rewritten(NamedTuple):
    row: Record
    update: bytes
    log_is_long: bool


async def rewrite(
    db: Executor,
    workshop: Workshop,
    document: UUID,
    *,
    author: UUID,
    text: str,
    cause: str,
    accepts: Accepts | None = None,
) -> Rewritten | None:
    """Make the text this one, by a minimal edit whose outcome gets a name: the document, and the edit.

    None where ``accepts`` refuses the document as it is.

    Raises:
        NotFound, Forbidden, TooLarge: there is none, or the author may not edit it (any more); it would be too large.
    """
    if len(text.encode()) > MOST_STATE_BYTES:
        raise TooLarge(f"Document exceeds the maximum size of {MOST_STATE_BYTES >> 20} MiB")
    for attempt in range(WRITE_AGAIN):
        log = await read_log(db, document)
        if accepts is not None and not accepts(log.version, log.revision):
            return None
        with paused():
            update = await _edit_to(text, log, workshop)
        if remaining(WRITE_SECONDS) < WRITE_SECONDS:  # it could be written, and nobody would know
            raise store_timed_out("PostgreSQL")
        # What others have just edited is not in this text; where they never rest, it is merged with theirs.
        merges = accepts is None and attempt == WRITE_AGAIN - 1
        row = await store.append_named(
            db,
            document=document,
            author=author,
            update=update,
            size=len(text.encode()),
            cause=cause,
            version=None if merges else log.version,
            revision=None if accepts is None else log.revision,
            pause_seconds=PAUSE_SECONDS,
        )
        if row is not None and row["version"] is None:
            raise Forbidden("You can no longer edit this document")
        if row is not None:
            return Rewritten(row, update, log.is_long)
    raise Unavailable("Document changes too fast")


async def _edit_to(text: str, log: Log, workshop: Workshop) -> bytes:
    """The update that makes a document's text this one.

    Raises:
        TooLarge: the document would be.
    """
    state = await workshop.revive(log.updates)
    update = await workshop.do(updates.rewrite, state, text)
    if update != wire.NOTHING and len(state) + len(update) > MOST_STATE_BYTES:
        state = await workshop.do(updates.settle, [state, update])
        if len(state) > MOST_STATE_BYTES:
            raise TooLarge(f"Document with its edit history exceeds the maximum size of {MOST_STATE_BYTES >> 20} MiB")
    return update
