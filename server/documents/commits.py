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
        self._busy: set[UUID] = set()
        self._more = asyncio.Event()

    async def run(self) -> None:
        self._busy.clear()
        async with asyncio.TaskGroup() as lanes:
            for _ in range(LANES):
                lanes.create_task(self._work())

    def put(self, edit: Edit) -> None:
        self._waiting.setdefault(edit.room.id, []).append(edit)
        self._more.set()

    async def _work(self) -> None:
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
            if count == len(waiting):
                del self._waiting[document]
            else:
                self._waiting[document] = waiting[count:]
        return batch

    async def _commit(self, batch: Sequence[Edit]) -> None:
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
        except ServiceError as error:
            self._failed(batch, error)
        except asyncpg.PostgresError:
            log.exception("updates not committed", updates=len(batch))
            self._failed(batch, Unavailable("The update could not be stored"))
        except Exception:
            self._failed(batch, Unavailable("The update could not be stored"))
            raise
        else:
            self._committed(batch, rows)
        finally:
            self._busy.difference_update(edit.room.id for edit in batch)
            self._more.set()
