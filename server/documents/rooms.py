"""Live documents: one in this process for however many have it open, loaded once, gone when the last has left.

An edit is applied here first, which tells whether it fits; then it is committed, and only then acknowledged and
passed on: at once to who is here, through Redis to other processes. PostgreSQL is the one truth. Whoever may have
missed something compares version numbers, and reads the log.
"""

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Iterable, Mapping, Sequence
from contextlib import asynccontextmanager
from contextvars import Context
from typing import Any, TypeVar
from uuid import UUID, uuid4

import asyncpg
import structlog
from aiohttp import web
from asyncpg import Record
from redis.exceptions import RedisError

from server import loop, metrics
from server.documents import logs, news, store, wire
from server.documents.awareness import Awareness, Presence
from server.documents.commits import LANES, PAUSE_SECONDS, Commits, Edit
from server.documents.compaction import compact
from server.documents.live import Live, well_formed
from server.documents.logs import Log, read_log, read_tail
from server.documents.news import Listener, Sight, Update
from server.documents.workshop import Workshop
from server.errors import Forbidden, NotFound, ServiceError, Unavailable, ValidationFailed
from server.postgres import Database
from server.realtime.background import run_forever
from server.realtime.channels import Channels, document_channel
from server.realtime.subscriber import Subscriber

log = structlog.get_logger()
T = TypeVar("T")

SUBSCRIBE_SECONDS = 0.5  # for Redis to confirm; later, what is missed is found by the sweep
READY_SECONDS = 5.0
RELOAD_SECONDS = 0.5
GAP_SECONDS = 0.2  # for numbers that are on their way
SWEEP_SECONDS = 1.0
SWEPT_AT_ONCE = 5000
NAMING_SECONDS = 20.0
NAMED_AT_ONCE = 100
MOST_UNPUBLISHED_BYTES = 16 << 20  # for Redis; what is not told is found when numbers are compared
MESSAGE_BYTES = 256  # that each takes besides its payload
GRACE_SECONDS = 60.0  # that updates stay in the log after a snapshot, for those who catch up


class Room:
    """One live document. Its numbers: ``version`` is the newest of which all before it are here too."""

    def __init__(self, id: UUID, rooms: "Rooms") -> None:
        self.id = id
        self.channel = document_channel(id)
        self.listeners: dict[str, Listener] = {}
        self.awareness = Awareness()
        self.live = Live()
        self.generation = 0
        self.version = 0
        self.usable = asyncio.Event()  # or it has failed
        self.failure: ServiceError | None = None
        self.users = 0
        self.in_flight = 0
        self.newest: asyncio.Future[int] | None = None
        self.log_updates = self.log_bytes = 0
        self.catching_up = self.minding = False
        self.turn = asyncio.Lock()
        """Held while an update is tasted: until it is applied, the live document stays as it is."""
        self._ahead: set[int] = set()
        self._meanwhile: list[Update] = []
        self._untasted: list[Update] = []
        self._rooms = rooms

    @property
    def idle(self) -> bool:
        return not (self.listeners or self.users or self.in_flight)

    @property
    def has_gap(self) -> bool:
        return bool(self._ahead)

    def knows(self, version: int) -> bool:
        return version <= self.version or version in self._ahead

    def note(self, version: int) -> None:
        self._ahead.add(version)
        while self.version + 1 in self._ahead:
            self.version += 1
            self._ahead.discard(self.version)
        if self._ahead:
            self._rooms.mind_gap(self)

    def replace(self, loaded: Log, live: Live) -> None:
        """Begin anew with what PostgreSQL has."""
        old = self.version
        self.live = live
        self.generation += 1
        self.log_updates = self.log_bytes = 0
        for row in loaded.tail:
            self.count(row["data"])
        told = {update.version for update in self._meanwhile}
        unheard = [row for row in loaded.tail if not self.knows(row["version"]) and row["version"] not in told]
        self.version = loaded.version
        self._ahead = set()
        self.usable.set()
        if self.generation > 1:
            if loaded.kept_version > old:
                self.tell(Update(self.id, loaded.version, None, self.live.update()))
            for row in unheard:
                self.tell(Update(self.id, row["version"], row["author_id"], row["data"]))
        meanwhile, self._meanwhile = self._meanwhile, []
        for update in meanwhile:
            if self.knows(update.version):
                continue
            if not self.live.trusts(update.data) or not self._bring_in(update):
                self._rooms.distrust(self)  # read once more, and this time it is in the log
                return

    def untasted(self) -> list[Update]:
        """What has had to wait until now."""
        untasted, self._untasted = self._untasted, []
        return untasted

    def take(self, update: Update, *, generation: int = 0, origin: str = "", tasted: bool = False) -> None:
        """An update is in the log; ``generation`` is that of the live document which has it already.

        What others found to fit need not fit here, where something else came first.
        """
        if not self.usable.is_set():
            self._meanwhile.append(update)  # what is being read may be older
        elif self.knows(update.version):
            return
        elif generation == self.generation:
            self.note(update.version)
        elif not tasted and (self.turn.locked() or not self.live.trusts(update.data)):
            self._untasted.append(update)
            self._rooms.taste_soon(self)
            return
        elif not self._bring_in(update):
            return
        # Whoever has committed the update that makes the log too long shortens it, and nobody else.
        if self.count(update.data) and generation:
            self._rooms.compact_soon(self.id)
        self.tell(update, origin=origin)

    def _bring_in(self, update: Update) -> bool:
        """Make the live document have what it lacks; whether it has."""
        try:
            self.live.apply(update.data)
        except ValidationFailed:
            self._rooms.distrust(self)
            return False
        self.note(update.version)
        return True

    def count(self, update: bytes) -> bool:
        """Whether the log has become long with this one."""
        self.log_updates += 1
        self.log_bytes += len(update)
        long = logs.is_long(self.log_updates, self.log_bytes)
        if long:
            self.log_updates = self.log_bytes = 0
        return long

    def tell(self, update: Update, *, origin: str = "") -> None:
        for listener in list(self.listeners.values()):
            if listener.id != origin:
                listener.hear(update)

    def show(self, sights: Iterable[Sight], *, origin: str = "") -> None:
        for sight in sights:
            for listener in list(self.listeners.values()):
                if listener.id != origin:
                    listener.see(sight)

    # As a Listener of its channel

    def deliver(self, origin: str, kind: str, payload: bytes) -> None:
        if origin == self._rooms.process:
            return
        if kind == "updates":
            if self.usable.is_set():  # else it is found when numbers are compared
                for update in news.read_updates(self.id, payload):
                    self.take(update)
        elif kind == "sights":
            now = time.time()
            for sight in news.read_sights(self.id, payload):
                if self.awareness.hear(sight.entry, owner=origin, user=sight.user, now=now):
                    self.show([sight])
        elif kind == "query":
            self._rooms.publish_sights(self, (sight for owner, sight in self.sights() if owner in self.listeners))

    def on_disconnect(self) -> None:
        """What is missed is read when it is over, and looked for by every sweep meanwhile."""

    async def resync(self) -> None:
        await self._rooms.catch_up(self)

    def renewed(self, now: float) -> list[tuple[str, Sight]]:
        """What has not been said for a while by those who are still here, and whose sockets they are."""
        renewed = self.awareness.renew(self.listeners, now=now)
        return [(each.owner, Sight(self.id, each.user, each.entry)) for each in renewed]

    def sights(self) -> list[tuple[str, Sight]]:
        """Who is looking: whose socket (or which process), and what they say."""
        return [(each.owner, Sight(self.id, each.user, each.entry)) for each in self.awareness]


class Rooms:
    """Of one process."""

    def __init__(self, db: Database, channels: Channels, subscriber: Subscriber) -> None:
        self.process = uuid4().hex
        self.workshop = Workshop()
        self._db = db
        self._channels = channels
        self._subscriber = subscriber
        self._rooms: dict[UUID, Room] = {}
        self._commits = Commits(db, committed=self._committed, failed=self._failed)
        self._compacting: set[UUID] = set()
        self._unpublished: list[tuple[str, str, bytes]] = []
        self._unpublished_bytes = 0
        self._to_publish = asyncio.Event()
        self._tasks: set[asyncio.Task[None]] = set()

    # Life

    def start(self) -> None:
        for endless in (*[self._commits.work] * LANES, self._publish, self._sweep, self._name_pauses):
            self._own(run_forever(endless))

    async def stop(self) -> None:
        while self._tasks:  # what is cancelled may begin others
            await loop.cancel_tasks(self._tasks)
        self.workshop.close()

    def _own(self, coroutine: Coroutine[Any, Any, None]) -> "asyncio.Task[None]":
        # Others wait for it too: it has nothing of the request that began it, neither its budget nor its name.
        task = asyncio.get_running_loop().create_task(coroutine, context=Context())
        self._tasks.add(task)
        task.add_done_callback(self._finished)
        return task

    def _finished(self, task: "asyncio.Task[None]") -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            log.error("a task of the documents died", error=repr(error))

    # Opening

    async def enter(self, document: UUID, listener: Listener) -> None:
        """Open a document: from now on the listener hears every edit.

        Raises:
            NotFound, Unavailable: there is none; PostgreSQL is away.
        """
        async with self.used(document) as room:
            room.listeners[listener.id] = listener

    async def difference(self, document: UUID, vector: bytes | None) -> tuple[bytes, bytes, int]:
        """What a client lacks which has this much, the document's own state vector, and its version.

        Raises:
            NotFound, Unavailable, ValidationFailed: there is none; PostgreSQL is away; that is no state vector.
        """
        return await self._durably(document, lambda room: (room.live.update(vector), room.live.vector(), room.version))

    async def vector(self, document: UUID) -> bytes:
        """The state vector of a document: what a client sees there, it never sends again.

        Raises:
            NotFound, Unavailable: there is none; PostgreSQL is away.
        """
        return await self._durably(document, lambda room: room.live.vector())

    async def _durably(self, document: UUID, look: Callable[[Room], T]) -> T:
        """What is seen of the live document, once all of that is in the log."""
        async with self.used(document) as room:
            while True:
                seen = look(room)
                if await self._is_durable(room):
                    return seen
                await self._ready(room)

    async def _is_durable(self, room: Room) -> bool:
        """Waits until what the live document shows now is committed; whether it was."""
        generation, newest = room.generation, room.newest
        if newest is not None and not newest.done():
            await asyncio.wait({newest})
        return room.generation == generation and room.usable.is_set() and room.failure is None

    def leave(self, document: UUID, listener: str) -> None:
        room = self._rooms.get(document)
        if room is not None and room.listeners.pop(listener, None) is not None:
            self._say_goodbye(room, room.awareness.leave(listener, now=time.time()))
            self._close_if_idle(room)

    def listener(self, document: UUID, id: str) -> Listener | None:
        """Who has it open, under that id."""
        room = self._rooms.get(document)
        return None if room is None else room.listeners.get(id)

    def text(self, document: UUID, *, version: int) -> str | None:
        """The text of a live document, where all of it is committed and this is its version."""
        room = self._rooms.get(document)
        if room is None or not room.usable.is_set() or room.in_flight or room.version != version:
            return None
        return room.live.text

    @asynccontextmanager
    async def used(self, document: UUID) -> AsyncIterator[Room]:
        """The room, loaded by the first who needs it and waited for by all others, and kept meanwhile.

        Raises:
            NotFound, Unavailable: no such document; it cannot be read now.
        """
        room = self._rooms.get(document)
        if room is None:
            room = self._rooms[document] = Room(document, self)
            metrics.DOCUMENTS_OPEN.inc()
            self._own(self._load(room))
        room.users += 1
        try:
            await self._ready(room)
            yield room
        finally:
            room.users -= 1
            self._close_if_idle(room)

    async def _ready(self, room: Room) -> None:
        try:
            async with asyncio.timeout(READY_SECONDS):
                await room.usable.wait()
        except TimeoutError:
            raise Unavailable("Document cannot be loaded now") from None
        if room.failure is not None:
            raise room.failure

    async def _load(self, room: Room) -> None:
        """Subscribed before it is read: what is committed in between is heard."""
        metrics.DOCUMENTS_LOADED.inc()
        room.users += 1
        try:
            await self._subscribe(room)
            await self._read(room)
            self._later(room, "query", b"")
        except (ServiceError, asyncpg.PostgresError) as error:
            room.failure = error if isinstance(error, ServiceError) else Unavailable("Document cannot be loaded now")
            self._drop(room)
            room.usable.set()
        finally:
            room.users -= 1
            self._close_if_idle(room)

    async def _read(self, room: Room) -> None:
        loaded = await read_log(self._db, room.id)
        state = await self.workshop.revive(loaded.updates)
        room.replace(loaded, Live(state))
        if loaded.is_long:
            self.compact_soon(room.id)

    async def _subscribe(self, room: Room) -> None:
        try:
            async with asyncio.timeout(SUBSCRIBE_SECONDS):
                await self._subscriber.subscribe(room.channel, room)
        except (Unavailable, TimeoutError):
            log.debug("document opened without Redis", document=str(room.id))

    def _close_if_idle(self, room: Room) -> None:
        if room.idle:
            self._drop(room)

    def _drop(self, room: Room) -> None:
        if self._rooms.get(room.id) is room:
            del self._rooms[room.id]
            metrics.DOCUMENTS_OPEN.dec()
            self._subscriber.unsubscribe(room.channel, room)

    # Editing

    async def edit(self, document: UUID, *, author: UUID, update: bytes, origin: str) -> int:
        """Apply, commit and pass on somebody's update; its version.

        Raises:
            ValidationFailed, TooLarge, NotFound, Forbidden, Unavailable: it is not in the log.
        """
        async with self.used(document) as room:
            while True:
                edit = await self.begin(document, author=author, update=update, origin=origin)
                if edit is not None:
                    return await asyncio.shield(edit.done)
                if await self._is_durable(room):
                    return room.version
                await self._ready(room)  # it was known, and may not be any more

    async def begin(self, document: UUID, *, author: UUID, update: bytes, origin: str) -> Edit | None:
        """As ``edit``, for who does not wait until it is in the log; None where it is known already."""
        async with self.used(document) as room:
            if room.turn.locked() or not room.live.trusts(update):
                return await self._begin_in_turn(room, author=author, update=update, origin=origin)
            return self._take(room, author=author, update=well_formed(update), origin=origin)

    async def _begin_in_turn(self, room: Room, *, author: UUID, update: bytes, origin: str) -> Edit | None:
        async with self.workshop.seat(author):
            try:
                async with room.turn:
                    update = await self._tasted(room, update)
                    return self._take(room, author=author, update=update, origin=origin)
            finally:
                for waited in room.untasted():
                    room.take(waited)

    async def _tasted(self, room: Room, update: bytes) -> bytes:
        """The update as it is stored, when it is known to do no harm to the live document as that is now."""
        while True:
            await self._ready(room)
            live = room.live
            if live.trusts(update):
                return well_formed(update)
            if live.has_deleted(update):
                return wire.NOTHING
            tasted = await self.workshop.taste(live.update(), update)
            if room.live is live and room.usable.is_set():
                return tasted

    def taste_soon(self, room: Room) -> None:
        """Updates that others have committed must be tasted, or wait until another has been."""
        if not room.turn.locked():
            self._own(self._taste_and_take(room))

    async def _taste_and_take(self, room: Room) -> None:
        async with room.turn:
            for update in room.untasted():
                try:
                    if not room.knows(update.version):
                        await self._tasted(room, update.data)
                except ServiceError as error:
                    log.info("update of another process not tasted", document=str(room.id), error=error.detail)
                    self.distrust(room)
                room.take(update, tasted=True)
        for update in room.untasted():
            room.take(update)

    def _take(self, room: Room, *, author: UUID, update: bytes, origin: str) -> Edit | None:
        if update == wire.NOTHING:
            return None
        room.live.demand_room_for(update)
        self._commits.demand_room_for(update)
        try:
            if not room.live.apply(update):
                return None
        except ValidationFailed:
            self.distrust(room)
            raise
        done: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        edit = Edit(room, room.generation, author, update, room.live.size, origin, done)
        room.newest = done
        room.in_flight += 1
        self._commits.put(edit)
        return edit

    def _committed(self, edits: Sequence[Edit], rows: Sequence[Record]) -> None:
        told: dict[Room, list[Update]] = {}
        for edit, row in zip(edits, rows, strict=True):
            try:
                if (update := self._settle(edit, row)) is not None:
                    told.setdefault(edit.room, []).append(update)
            except Exception:  # one listener's trouble is not that of all others in the batch
                log.exception("an edit was not passed on", document=str(edit.room.id))
        for room, found in told.items():
            self._later(room, "updates", news.write_updates(found))
            self._close_if_idle(room)

    def _settle(self, edit: Edit, row: Record) -> Update | None:
        """An edit's outcome, for who waits for it and for who has it open here; the update, where it is in the log."""
        if row["version"] is None:
            gone = NotFound("Document was deleted")
            self._refuse(edit, Forbidden("You can no longer edit this document") if row["exists"] else gone)
            return None
        room, update = edit.room, Update(edit.room.id, row["version"], edit.author, edit.update)
        room.in_flight -= 1
        metrics.DOCUMENT_UPDATES.labels("committed").inc()
        if not edit.done.done():
            edit.done.set_result(update.version)
        room.take(update, generation=edit.generation, origin=edit.origin)
        if row["paused_version"] is not None:
            self.announce_version(row)
        return update

    def _failed(self, edits: Sequence[Edit], error: ServiceError) -> None:
        for edit in edits:
            self._refuse(edit, error)

    def _refuse(self, edit: Edit, error: ServiceError) -> None:
        """The live document shows what is not in the log: it must not be shown to anybody any more."""
        room = edit.room
        room.in_flight -= 1
        metrics.DOCUMENT_UPDATES.labels("refused").inc()
        if not edit.done.done():
            edit.done.set_exception(error)
            edit.done.exception()  # not everybody waits
        if isinstance(error, NotFound):
            self._lose(room, error)
        elif edit.generation == room.generation:
            self.distrust(room)
        # Whoever sent the same once more was taken to be known already.
        for listener in list(room.listeners.values()):
            listener.restart()
        self._close_if_idle(room)

    def accept(self, update: Update) -> None:
        """An update that was committed without a live document."""
        room = self._rooms.get(update.document)
        if room is not None and room.failure is None:
            room.take(update)
        self._tell_others(document_channel(update.document), "updates", news.write_updates([update]))

    # Catching up

    def distrust(self, room: Room) -> None:
        """Load it anew; until then nobody reads or writes it."""
        if room.usable.is_set() and room.failure is None:
            room.usable.clear()
            self._own(self._reload(room))

    async def _reload(self, room: Room) -> None:
        room.users += 1
        try:
            while True:
                try:
                    return await self._read(room)
                except NotFound as error:
                    return self._lose(room, error)
                except (ServiceError, asyncpg.PostgresError) as error:
                    log.warning("document not read anew yet", document=str(room.id), error=str(error))
                    await asyncio.sleep(RELOAD_SECONDS)
        finally:
            room.users -= 1
            self._close_if_idle(room)

    async def catch_up(self, room: Room) -> None:
        """Read what others have committed. Where the log no longer reaches back so far, begin anew."""
        if room.catching_up or room.turn.locked() or not room.usable.is_set():
            return
        room.catching_up = True
        try:
            head = await store.read_heads(self._db, documents=[room.id])
            if not head:
                self._lose(room, NotFound("Document was deleted"))
                return
            tail = await read_tail(self._db, room.id, after=room.version, until=head[0]["version"])
            if tail is None:
                self.distrust(room)
            elif room.usable.is_set():
                for row in tail:
                    room.take(Update(room.id, row["version"], row["author_id"], row["data"]))
        finally:
            room.catching_up = False

    def _lose(self, room: Room, error: ServiceError) -> None:
        room.failure = error
        room.usable.set()
        self._drop(room)
        for listener in list(room.listeners.values()):
            listener.lost()
        room.listeners.clear()

    def mind_gap(self, room: Room) -> None:
        """A number is missing: it is on its way, or lost."""
        if not room.minding:
            room.minding = True
            self._own(self._fill_gap(room))

    async def _fill_gap(self, room: Room) -> None:
        try:
            await asyncio.sleep(GAP_SECONDS)
            if room.has_gap:
                await self.catch_up(room)
        except ServiceError as error:
            log.debug("gap not filled yet", error=error.detail)
        finally:
            room.minding = False

    async def _sweep(self) -> None:
        """Notice what no message told: Redis may be away, or have lost one."""
        while True:
            await asyncio.sleep(SWEEP_SECONDS)
            self._tend_awareness()
            try:
                open_here = [room for room in self._rooms.values() if room.usable.is_set()]
                for start in range(0, len(open_here), SWEPT_AT_ONCE):
                    await self._compare(open_here[start : start + SWEPT_AT_ONCE])
            except (ServiceError, asyncpg.PostgresError) as error:
                log.debug("documents not compared", error=str(error))

    async def _compare(self, rooms: Sequence[Room]) -> None:
        heads = {row["id"]: row for row in await store.read_heads(self._db, documents=[room.id for room in rooms])}
        for room in rooms:
            try:
                await self._follow(room, heads.get(room.id))
            except Exception:  # a door of its own: whatever is wrong with this one, others come behind it
                log.exception("document not compared", document=str(room.id))

    async def _follow(self, room: Room, head: Record | None) -> None:
        """Do what its row in PostgreSQL tells us to (None for a document that is gone)."""
        if head is None or head["version"] > room.version:
            await self.catch_up(room)
        elif head["version"] == room.version and not room.in_flight and head["size"] != room.live.size:
            await store.correct_size(self._db, document=room.id, version=room.version, size=room.live.size)

    # Awareness

    def sights(self, document: UUID) -> list[Sight]:
        """Who is looking at an open document."""
        room = self._rooms.get(document)
        return [sight for _, sight in room.sights()] if room else []

    def say(self, document: UUID, listener: str, user: UUID, entries: Iterable[wire.Entry]) -> None:
        """What somebody says of themselves, to all others.

        Raises:
            Malformed: what they say is not JSON, or too much.
        """
        room = self._rooms.get(document)
        if room is None:
            return  # it was deleted at this moment
        said = room.awareness.say(listener, user, entries, now=time.time())
        if said is not None:
            sight = Sight(room.id, user, said)
            room.show([sight], origin=listener)
            self.publish_sights(room, [sight])

    def _say_goodbye(self, room: Room, gone: Iterable[Presence]) -> None:
        sights = [Sight(room.id, each.user, each.entry) for each in gone]
        room.show(sights)
        self.publish_sights(room, sights)

    def _tend_awareness(self) -> None:
        now = time.time()
        for room in self._rooms.values():
            for owner, sight in room.renewed(now):
                room.show([sight], origin=owner)  # clients here forget the silent ones too
                self.publish_sights(room, [sight])
            self._say_goodbye(room, room.awareness.prune(now=now))

    def publish_sights(self, room: Room, sights: Iterable[Sight]) -> None:
        for sight in sights:
            self._later(room, "sights", news.write_sight(sight))

    # Telling other processes

    def _later(self, room: Room, kind: str, payload: bytes) -> None:
        self._tell_others(room.channel, kind, payload)

    def _tell_others(self, channel: str, kind: str, payload: bytes) -> None:
        if self._unpublished_bytes < MOST_UNPUBLISHED_BYTES:
            self._unpublished.append((channel, kind, payload))
            self._unpublished_bytes += MESSAGE_BYTES + len(payload)
            self._to_publish.set()

    async def _publish(self) -> None:
        """In order, many at once. What cannot be told now is found by comparing numbers."""
        while True:
            await self._to_publish.wait()
            self._to_publish.clear()
            messages, self._unpublished, self._unpublished_bytes = self._unpublished, [], 0
            try:
                await self._channels.publish_many(messages, origin=self.process)
            except (RedisError, OSError) as error:
                log.debug("documents not published", error=str(error), messages=len(messages))

    # Upkeep

    def announce_version(self, row: Mapping[str, Any]) -> None:
        """A version has got a name because editing paused: tell the workspace."""
        self._own(
            self._channels.announce_committed(
                "DOCUMENT_CHANGED",
                workspaces=[row["workspace_id"]],
                user=row["paused_by"],
                name=row["paused_name"] or "",
                documentId=row["document"],
                path=row["path"],
                version=row["paused_version"],
            )
        )

    async def _name_pauses(self) -> None:
        while True:
            await asyncio.sleep(NAMING_SECONDS)
            try:
                for row in await store.name_pauses(self._db, pause_seconds=PAUSE_SECONDS, limit=NAMED_AT_ONCE):
                    self.announce_version(row)
            except ServiceError as error:
                log.debug("versions not named yet", error=error.detail)

    def compact_soon(self, document: UUID) -> None:
        """Its log has become long."""
        if document not in self._compacting:
            self._compacting.add(document)
            self._own(self._compact(document))

    async def _compact(self, document: UUID) -> None:
        """Until it is long no more: another process may have done it."""
        try:
            while (found := await read_log(self._db, document)).is_long:
                if not await compact(self._db, self.workshop, found, grace_seconds=GRACE_SECONDS):
                    break
        except (ServiceError, asyncpg.PostgresError) as error:
            log.warning("log not compacted", document=str(document), error=str(error))
        finally:
            self._compacting.discard(document)


ROOMS = web.AppKey("rooms", Rooms)
