"""Live documents when commits fail, wait or are rejected: acknowledged edits are in the log and are delivered."""

import asyncio
from uuid import UUID, uuid4

import aiohttp
import asyncpg
import pytest
from prometheus_client import REGISTRY
from pycrdt import Doc, Text

from server.deadline import remaining, store_deadline
from server.documents import rooms as rooms_module
from server.documents import store, wire
from server.documents.commits import Commits, Edit
from server.documents.logs import Log, read_log
from server.documents.news import Sight, Update
from server.documents.rooms import Rooms
from server.errors import Forbidden, NotFound, Unavailable
from server.postgres import Database
from tests.actors import Actor
from tests.documents.conftest import Hold, MakeRooms
from tests.documents.editors import Editor, make_document
from tests.documents.test_history import rest_for
from tests.documents.test_yjs import NodeEditor, StartNode, compared, raw_socket, start_node
from tests.timeouts import WAIT_TIMEOUT_SECONDS

__all__ = ["start_node"]


class Ear:
    """A listener of an open document that records the updates it receives."""

    def __init__(self) -> None:
        self.id = uuid4().hex
        self.heard: list[Update] = []
        self.restarts = 0
        self.is_lost = False

    def hear(self, update: Update) -> None:
        self.heard.append(update)

    def see(self, sight: Sight) -> None:
        pass

    def restart(self) -> None:
        self.restarts += 1

    def lost(self) -> None:
        self.is_lost = True


def typed(text: str) -> bytes:
    """Return the update of a client that types without having loaded the document."""
    doc: Doc[Text] = Doc()
    content = doc.get("content", type=Text)
    content += text
    return doc.get_update()


def begin(rooms: Rooms, document: str, author: Actor | UUID, text: str | bytes) -> "asyncio.Task[int]":
    by = author if isinstance(author, UUID) else UUID(author.id)
    update = text if isinstance(text, bytes) else typed(text)
    return asyncio.ensure_future(rooms.edit(UUID(document), author=by, update=update, origin=""))


async def shown(rooms: Rooms, document: str) -> str:
    doc: Doc[Text] = Doc()
    text = doc.get("content", type=Text)
    doc.apply_update((await rooms.difference(UUID(document), None))[0])
    return str(text)


async def test_edit_committed_during_a_reload_stays_in_the_live_document(
    alice: Actor, workspace: str, rooms: Rooms, hold: Hold, monkeypatch: pytest.MonkeyPatch
) -> None:
    document, ear, was_read = await make_document(alice, workspace), Ear(), asyncio.Event()
    await rooms.enter(UUID(document), ear)
    async with hold(document) as held:
        edit = begin(rooms, document, alice, "acknowledged")
        await held.waited_for()

        async def slowly(db: Database, id: UUID) -> Log:
            loaded = await read_log(db, id)
            was_read.set()
            await asyncio.wait({edit})  # as long as the read of a large log
            return loaded

        monkeypatch.setattr(rooms_module, "read_log", slowly)
        async with rooms.used(UUID(document)) as room:
            rooms.distrust(room)
        await was_read.wait()
    assert await edit == 2
    assert await shown(rooms, document) == "acknowledged"
    assert [update.version for update in ear.heard] == [2]


async def test_resent_update_is_acknowledged_only_when_it_is_in_the_log(
    alice: Actor, workspace: str, rooms: Rooms, hold: Hold, db: Database
) -> None:
    document, ear = await make_document(alice, workspace), Ear()
    await rooms.enter(UUID(document), ear)
    precious = typed("precious")
    async with hold(document) as held:
        first = begin(rooms, document, alice, precious)
        await held.waited_for()
        again = begin(rooms, document, alice, precious)
        await held.cancelled()
        with pytest.raises(Unavailable):
            await first
    assert await again == 2
    assert [row["data"] for row in (await read_log(db, UUID(document))).tail][1:] == [precious]
    assert ear.restarts == 1, "the listener may have resent the same update"


async def test_y_websocket_client_receives_only_durable_updates(alice: Actor, workspace: str, hold: Hold) -> None:
    document, precious = await make_document(alice, workspace), typed("precious")
    hers, before = await raw_socket(alice, document), await raw_socket(alice, document)
    async with hold(document) as held:
        await hers.send_bytes(wire.sync(wire.UPDATE, precious))
        await held.waited_for()
        await before.send_bytes(wire.sync(wire.STEP_2, precious))  # already known: no effect
        late = await alice.http.ws_connect(
            f"{alice.base}/yjs/{document}", protocols=("collab.v1", f"bearer.{alice.access_token}")
        )
        with pytest.raises(TimeoutError):
            await late.receive(timeout=0.2)
        await held.cancelled()
        for socket in (before, late):
            assert (await last_frame(socket)).type is aiohttp.WSMsgType.CLOSE
            assert socket.close_code == 1013
    again = await raw_socket(alice, document)
    await again.send_bytes(wire.sync(wire.STEP_2, precious))
    await compared(again)
    assert (await alice.get(f"/documents/{document}/content")).body == "precious"
    await again.close()


async def test_y_websocket_clients_keep_typing_while_commits_fail(
    alice: Actor, bob: Actor, workspace: str, start_node: StartNode, hold: Hold
) -> None:
    document = await make_document(alice, workspace)
    hers, his = await start_node(alice, document), await start_node(bob, document)
    await hers.until(synced=True)
    await his.until(synced=True)
    async with hold(document) as held:
        await hers.do("insert", text="hers ")
        await held.cancelled()
        await his.do("insert", text="his ")
        await held.cancelled()
    text = sorted((await both(hers, his)).split())
    assert text == ["hers", "his"]
    assert sorted((await alice.get(f"/documents/{document}/content")).body.split()) == text


async def both(*editors: NodeEditor) -> str:
    """Wait until all editors have the whole text, and return it."""
    async with asyncio.timeout(WAIT_TIMEOUT_SECONDS):
        while True:
            texts = {(await each.do("state"))["text"] for each in editors}
            if len(texts) == 1 and len(text := texts.pop()) == len("hers his "):
                return text
            await asyncio.sleep(0.05)


async def last_frame(socket: aiohttp.ClientWebSocketResponse) -> aiohttp.WSMessage:
    """Return the first frame that is not binary; fail on a sync message before it."""
    while (message := await socket.receive(timeout=WAIT_TIMEOUT_SECONDS)).type is aiohttp.WSMsgType.BINARY:
        assert not isinstance(wire.parse(message.data), wire.Sync), "the client received the content"
    return message


async def test_rejected_edit_does_not_fail_the_others_in_its_batch(
    alice: Actor, bob: Actor, carol: Actor, workspace: str, rooms: Rooms, hold: Hold
) -> None:
    document, beside = await make_document(alice, workspace), await make_document(alice, workspace, path="beside")
    async with hold(document) as held:
        first = begin(rooms, document, alice, "1")
        await held.waited_for()
        edits = [begin(rooms, document, author, "x") for author in (alice, carol, bob, carol, alice)]
        edits.append(begin(rooms, beside, bob, "x"))
        await asyncio.sleep(0.05)
    done = await asyncio.gather(first, *edits, return_exceptions=True)
    assert [type(each) for each in done] == [int, int, Forbidden, int, Forbidden, int, int]
    assert await shown(rooms, document) == (await alice.get(f"/documents/{document}/content")).body
    assert sorted(await shown(rooms, document)) == sorted("1xxx")
    assert await shown(rooms, beside) == "x"


async def queued(rooms: Rooms, edits: int) -> None:
    """Wait until this many edits are pending."""
    async with asyncio.timeout(WAIT_TIMEOUT_SECONDS):
        while sum(map(len, rooms._commits._waiting.values())) < edits:
            await asyncio.sleep(0.01)


async def test_updates_are_committed_in_batches(alice: Actor, workspace: str, rooms: Rooms, hold: Hold) -> None:
    document = await make_document(alice, workspace)

    def commits() -> float:
        return REGISTRY.get_sample_value("document_commit_seconds_count") or 0

    async with hold(document) as held:
        first = begin(rooms, document, alice, "0")
        await held.waited_for()
        editor: Doc[Text] = Doc()
        text = editor.get("content", type=Text)
        updates = []
        for number in range(50):
            known = editor.get_state()
            text += f"{number} "
            updates.append(editor.get_update(known))
        edits = [begin(rooms, document, alice, update) for update in updates]
        await queued(rooms, len(edits))
        before = commits()
    assert await asyncio.gather(first, *edits) == list(range(2, 53))
    assert commits() - before <= 5


async def test_edit_in_flight_to_a_deleted_document_is_rejected(
    alice: Actor, workspace: str, rooms: Rooms, hold: Hold
) -> None:
    document, ear = await make_document(alice, workspace), Ear()
    await rooms.enter(UUID(document), ear)
    async with hold(document) as held:
        edit = begin(rooms, document, alice, "too late")
        await held.waited_for()
        await held.deleted()
    with pytest.raises(NotFound):
        await edit
    assert (ear.is_lost, ear.restarts) == (True, 0)


async def test_failing_listener_does_not_block_other_documents(alice: Actor, workspace: str, rooms: Rooms) -> None:
    document, beside = await make_document(alice, workspace), await make_document(alice, workspace, path="beside")
    deaf, ear = Ear(), Ear()
    deaf.heard = None  # type: ignore[assignment]
    await rooms.enter(UUID(document), deaf)
    await rooms.enter(UUID(beside), ear)
    async with asyncio.timeout(WAIT_TIMEOUT_SECONDS):
        assert await asyncio.gather(*(begin(rooms, each, alice, "x") for each in (document, beside))) == [2, 2]
    assert [update.version for update in ear.heard] == [2]


async def test_cancelled_commit_worker_fails_its_pending_edits(
    alice: Actor, workspace: str, rooms: Rooms, hold: Hold, db: Database
) -> None:
    document = await make_document(alice, workspace)
    refused: list[Edit] = []
    async with rooms.used(UUID(document)) as room, hold(document) as held:
        commits = Commits(db, committed=lambda *_: None, failed=lambda edits, _: refused.extend(edits))
        lane = asyncio.ensure_future(commits.work())
        done: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        commits.put(Edit(room, 1, UUID(alice.id), typed("x"), 1, "", done))
        await held.waited_for()
        lane.cancel()
        await asyncio.wait({lane})
    assert [edit.done for edit in refused] == [done]


async def test_busy_document_does_not_starve_other_documents(
    alice: Actor, workspace: str, rooms: Rooms, db: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("server.documents.commits.BATCH_UPDATES", 2)
    order: list[int] = []
    commits = Commits(db, committed=lambda edits, _: order.extend(edit.size for edit in edits), failed=lambda *_: None)
    busy, other = await make_document(alice, workspace), await make_document(alice, workspace, path="other")
    async with rooms.used(UUID(busy)) as many, rooms.used(UUID(other)) as one:
        for number, room in enumerate((many, many, many, many, many, one)):
            done: asyncio.Future[int] = asyncio.get_running_loop().create_future()
            commits.put(Edit(room, 1, UUID(alice.id), typed("x"), number, "", done))
        lane = asyncio.ensure_future(commits.work())
        async with asyncio.timeout(WAIT_TIMEOUT_SECONDS):
            while len(order) < 6:
                await asyncio.sleep(0.01)
        lane.cancel()
    assert order == [0, 1, 5, 2, 3, 4]


async def test_pending_edits_are_bounded_in_bytes(
    alice: Actor, workspace: str, rooms: Rooms, hold: Hold, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("server.documents.commits.MOST_WAITING_BYTES", 1000)
    document = await make_document(alice, workspace)
    async with hold(document) as held:
        first = begin(rooms, document, alice, "x" * 800)
        await held.waited_for()
        with pytest.raises(Unavailable):
            await begin(rooms, document, alice, "y" * 800)
    assert await first == 2
    assert await begin(rooms, document, alice, "z" * 800) == 3


async def test_update_in_flight_of_an_aborted_client_is_committed_once(
    alice: Actor, bob: Actor, workspace: str, hold: Hold
) -> None:
    document = await make_document(alice, workspace)
    hers, his = await Editor(alice, document).open(), await Editor(bob, document).open()
    async with hold(document) as held:
        sending = asyncio.ensure_future(hers.type("last words"))
        await held.waited_for()
        hers.socket.abort()
    await his.until("last words")
    await asyncio.wait({sending})
    await hers.open()
    assert hers.version == 2, "the resent update is known and makes no second version"
    assert await his.type("!") == 3


async def test_shared_load_is_not_bound_to_the_deadline_of_its_first_caller(
    alice: Actor, workspace: str, rooms: Rooms, monkeypatch: pytest.MonkeyPatch
) -> None:
    document, allowed = await make_document(alice, workspace), []

    async def reading(db: Database, id: UUID) -> Log:
        allowed.append(remaining(600))
        return await read_log(db, id)

    monkeypatch.setattr(rooms_module, "read_log", reading)
    with store_deadline(20):
        async with rooms.used(UUID(document)):
            pass
    assert allowed == [600]


async def test_reload_of_a_document_is_retried_until_it_succeeds(
    alice: Actor, workspace: str, rooms: Rooms, monkeypatch: pytest.MonkeyPatch
) -> None:
    document, failures = await make_document(alice, workspace, content="here"), [asyncpg.DataCorruptedError("broken")]

    async def failing(db: Database, id: UUID) -> Log:
        if failures:
            raise failures.pop()
        return await read_log(db, id)

    async with rooms.used(UUID(document)) as room:
        monkeypatch.setattr(rooms_module, "read_log", failing)
        rooms.distrust(room)
        assert await shown(rooms, document) == "here"
    assert not failures


async def test_version_before_a_pause_is_named_and_announced_automatically(
    alice: Actor, bob: Actor, workspace: str, make_rooms: MakeRooms, database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rooms_module, "NAMING_SECONDS", 0.05)
    document = await make_document(alice, workspace)
    await (await Editor(alice, document).open()).type("the end")
    room = await bob.connect(workspace)
    await rest_for(database_url, document, 301)
    make_rooms()
    await room.assert_push("DOCUMENT_CHANGED", documentId=document, version=2, userId=alice.id)


async def test_document_that_fails_to_sync_does_not_block_other_documents(
    alice: Actor, workspace: str, rooms: Rooms, db: Database
) -> None:
    broken, fine = await make_document(alice, workspace), await make_document(alice, workspace, path="fine")
    deaf, ear = Ear(), Ear()
    deaf.heard = None  # type: ignore[assignment]
    await rooms.enter(UUID(broken), deaf)
    await rooms.enter(UUID(fine), ear)
    for document in (broken, fine):  # as another process that publishes nothing
        await store.append(
            db,
            documents=[UUID(document)],
            authors=[UUID(alice.id)],
            updates=[typed("x")],
            sizes=[1],
            pause_seconds=300,
        )
    async with asyncio.timeout(WAIT_TIMEOUT_SECONDS):
        while not ear.heard:
            await asyncio.sleep(0.05)
