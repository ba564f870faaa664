"""Group commits: what arrives while a commit is under way goes with the next one, whatever document it is of.

Updates of one document are committed in the order in which they came; a few lanes work beside each other on
different documents, so that a large update of one holds up few others.
"""

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING
from uuid import UUID

import asyncpg
import structlog
from asyncpg import Record

from server import metrics
from server.documents import store
from server.errors import ServiceError, Unavailable
from server.postgres import Executor

if TYPE_CHECKING:
    from server.documents.rooms import Room

log = structlog.get_logger()

LANES = 3
BATCH_UPDATES = 1000
BATCH_BYTES = 1 << 20  # or one update that is larger
MOST_WAITING_BYTES = 64 << 20  # of all updates that are not committed yet
PAUSE_SECONDS = 300.0  # of nobody editing: what was there before gets a name


@dataclass(eq=False, slots=True)
class Edit:
    """An update that the live document has taken, on its way to the log."""

    room: "Room"
    generation: int  # of the room's live document
    author: UUID
    update: bytes
    size: int  # of the text afterwards
    origin: str
    done: "asyncio.Future[int]"


class Commits:
    """``committed`` and ``failed`` are told at once, before anybody who waits for ``Edit.done``."""

    def __init__(
        self,
        db: Executor,
        *,
        committed: Callable[[Sequence[Edit], Sequence[Record]], None],
        failed: Callable[[Sequence[Edit], ServiceError], None],
    ) -> None:
        self._db = db
        self._committed = committed
        self._failed = failed
        self._waiting: dict[UUID, list[Edit]] = {}
        self._bytes = 0
        self._busy: set[UUID] = set()
        self._more = asyncio.Event()

    def demand_room_for(self, update: bytes) -> None:
        """Raises Unavailable where too much waits for PostgreSQL already."""
        if self._bytes + len(update) > MOST_WAITING_BYTES:
            raise Unavailable(f"Updates that wait for PostgreSQL exceed the maximum of {MOST_WAITING_BYTES >> 20} MiB")

    def put(self, edit: Edit) -> None:
        self._bytes += len(edit.update)
        self._waiting.setdefault(edit.room.id, []).append(edit)
        self._more.set()

    async def work(self) -> None:
        """One lane."""
        while True:
            batch = self._take()
            if batch:
                await self._commit(batch)
            else:
                self._more.clear()
                await self._more.wait()

    def _take(self) -> list[Edit]:
        """The next edits, of documents that no other lane is busy with."""
        batch: list[Edit] = []
        room_left = BATCH_BYTES
        for document in [each for each in self._waiting if each not in self._busy]:
            waiting = self._waiting[document]
            count = 0
            while count < len(waiting) and len(batch) < BATCH_UPDATES and (room_left > 0 or not batch):
                batch.append(waiting[count])
                room_left -= len(waiting[count].update)
                count += 1
            if count == 0:
                break
            self._busy.add(document)
            del self._waiting[document]
            if count < len(waiting):
                self._waiting[document] = waiting[count:]  # behind all others, which have not been served yet
        return batch

    async def _commit(self, batch: Sequence[Edit]) -> None:
        rows: Sequence[Record] | None = None
        error: ServiceError = Unavailable("The update could not be stored")
        try:
            with metrics.DOCUMENT_COMMITS.time():
                rows = await store.append(
                    self._db,
                    documents=[edit.room.id for edit in batch],
                    authors=[edit.author for edit in batch],
                    updates=[edit.update for edit in batch],
                    sizes=[edit.size for edit in batch],
                    pause_seconds=PAUSE_SECONDS,
                )
        except ServiceError as refusal:
            error = refusal
        except asyncpg.PostgresError:
            log.exception("updates not committed", updates=len(batch))
        finally:  # whatever else it was: nobody waits for ever
            self._busy.difference_update(edit.room.id for edit in batch)
            self._bytes -= sum(len(edit.update) for edit in batch)
            self._more.set()
            if rows is None:
                self._failed(batch, error)
            else:
                self._committed(batch, rows)
