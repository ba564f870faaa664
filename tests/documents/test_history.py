"""Named versions and compaction: named versions are kept, and the log stays short under concurrent appends."""

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any
from uuid import UUID

import aiohttp
import asyncpg
import pytest

from server import postgres
from server.deadline import store_deadline
from server.documents import compaction, logs, store, updates, wire
from server.documents.workshop import Workshop
from server.errors import Forbidden, Unavailable
from server.postgres import Database
from tests.actors import Actor
from tests.documents.editors import Editor, make_document
from tests.documents.test_yjs import raw_socket
from tests.sockets import ErrorReply
from tests.timeouts import WAIT_TIMEOUT_SECONDS


async def rest_for(database_url: str, document: str, seconds: int) -> None:
    """Backdate a document and its updates, as if its last edit was this long ago."""
    connection = await asyncpg.connect(database_url)
    await connection.execute(
        "UPDATE documents SET updated_at = updated_at - make_interval(secs => $2) WHERE id = $1",
        UUID(document),
        seconds,
    )
    await connection.execute(
        "UPDATE document_updates SET at = at - make_interval(secs => $2) WHERE document_id = $1",
        UUID(document),
        seconds,
    )
    await connection.close()


async def versions_of(actor: Actor, document: str) -> list[tuple[int, str]]:
    return [(each["version"], each["cause"]) for each in (await actor.get(f"/documents/{document}/versions"))["items"]]


async def test_pause_in_editing_names_the_version_before_it(
    alice: Actor, bob: Actor, workspace: str, database_url: str
) -> None:
    document = await make_document(alice, workspace)
    room, hers = await bob.connect(workspace), await Editor(alice, document).open()
    await hers.type("before")
    await rest_for(database_url, document, 299)
    await hers.type(", still before")
    assert await versions_of(bob, document) == [(1, "created")]
    await rest_for(database_url, document, 301)
    await hers.type(", after")
    assert await versions_of(bob, document) == [(3, "pause"), (1, "created")]
    assert (await bob.get(f"/documents/{document}/versions/3"))["content"] == "before, still before"
    await room.assert_push("DOCUMENT_CHANGED", documentId=document, version=3, userId=alice.id, userName="Alice")
    await room.refute_push()


async def test_pause_is_named_without_a_further_edit(
    alice: Actor, workspace: str, db: Database, database_url: str
) -> None:
    document = await make_document(alice, workspace)
    hers = await Editor(alice, document).open()
    await hers.type("the end")
    await rest_for(database_url, document, 301)
    named = await asyncio.gather(*(store.name_pauses(db, pause_seconds=300, limit=1000) for _ in range(5)))
    mine = [row for rows in named for row in rows if str(row["document"]) == document]
    assert [(row["paused_version"], str(row["paused_by"])) for row in mine] == [(2, alice.id)]
    assert await versions_of(alice, document) == [(2, "pause"), (1, "created")]


async def test_write_after_a_pause_names_both_versions(alice: Actor, workspace: str, database_url: str) -> None:
    document = await make_document(alice, workspace)
    await (await Editor(alice, document).open()).type("typed")
    await rest_for(database_url, document, 301)
    await alice.put(f"/documents/{document}/content", data=b"put", headers={"If-Match": "*"})
    assert await versions_of(alice, document) == [(3, "put"), (2, "pause"), (1, "created")]
    assert (await alice.get(f"/documents/{document}/versions/2"))["content"] == "typed"


async def log_length(db: Database, document: str) -> int:
    row = await db.fetchval("SELECT count(*) FROM document_updates WHERE document_id = $1", UUID(document))
    return int(row)


async def compacted(db: Database, document: str, *, grace_seconds: int = 0) -> bool:
    """Compact a document although its log is short."""
    log = await logs.read_log(db, UUID(document))
    return await compaction.compact(db, Workshop(), log, grace_seconds=grace_seconds)


async def test_compaction_keeps_the_text_and_the_named_versions(
    alice: Actor, workspace: str, db: Database, database_url: str
) -> None:
    document = await make_document(alice, workspace, content="0")
    editor = await Editor(alice, document).open()
    for number in range(1, 60):
        await editor.type(f" {number}")
        if number in (20, 40):
            await rest_for(database_url, document, 301)
    before = await versions_of(alice, document)
    assert [version for version, _ in before] == [41, 21, 1]
    texts = [(await alice.get(f"/documents/{document}/versions/{version}"))["content"] for version, _ in before]
    await rest_for(database_url, document, 61)
    assert await compacted(db, document, grace_seconds=60)
    assert await log_length(db, document) == 0
    assert await versions_of(alice, document) == before
    kept = [(await alice.get(f"/documents/{document}/versions/{version}"))["content"] for version, _ in before]
    assert kept == texts
    assert (await alice.get(f"/documents/{document}/content")).body == editor.text
    await editor.type(" more")
    late = await Editor(alice, document).open()
    assert late.text == editor.text
    assert (await alice.post(f"/documents/{document}/restore", {"version": 21})).status == 200
    await late.until(texts[1])


async def test_updates_appended_during_compaction_are_kept(
    alice: Actor, bob: Actor, workspace: str, db: Database
) -> None:
    document = await make_document(alice, workspace)
    hers, his = await Editor(alice, document).open(), await Editor(bob, document).open()
    acknowledged: list[str] = []
    typing = [asyncio.ensure_future(each.mark(name, acknowledged)) for each, name in ((hers, "a"), (his, "b"))]
    done = 0
    for _ in range(8):
        made = await asyncio.gather(*(compacted(db, document) for _ in range(3)))
        done += sum(made)
        await asyncio.sleep(0.02)
    for task in typing:
        task.cancel()
    await asyncio.wait(typing)
    assert done >= 4
    assert await log_length(db, document) < len(acknowledged)
    text = (await alice.get(f"/documents/{document}/content")).body
    assert [mark for mark in acknowledged if mark not in text] == []
    assert (await (Editor(alice, document)).open()).text == text


async def test_update_before_its_predecessor_survives_compaction(alice: Actor, workspace: str, db: Database) -> None:
    document = await make_document(alice, workspace)
    editor = await Editor(alice, document).open()
    first, second = editor.insert("a"), editor.insert("b")
    await editor.send(second)
    await editor.socket.close()
    assert await compacted(db, document)
    fresh = await Editor(alice, document).open()
    assert fresh.text == ""
    await fresh.send(first)
    assert (await alice.get(f"/documents/{document}/content")).body == "ab"


async def test_process_that_missed_compacted_updates_reloads_the_document(
    alice: Actor, bob: Actor, workspace: str, db: Database, database_url: str
) -> None:
    """Another process writes and compacts without publishing a message."""
    document = await make_document(alice, workspace, content="old")
    his = await Editor(bob, document).open()
    await logs.rewrite(db, Workshop(), UUID(document), author=UUID(alice.id), text="new one", cause="put")
    await logs.rewrite(db, Workshop(), UUID(document), author=UUID(alice.id), text="new two", cause="put")
    await compacted(db, document)
    await his.until("new two")
    assert await his.type("!") == 4


async def test_long_log_is_compacted_automatically(
    alice: Actor, workspace: str, db: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("server.documents.logs.COMPACT_UPDATES", 50)
    monkeypatch.setattr("server.documents.rooms.GRACE_SECONDS", 0)
    document = await make_document(alice, workspace)
    editor = await Editor(alice, document).open()
    for number in range(60):
        await editor.type(f"{number} ")
    async with asyncio.timeout(WAIT_TIMEOUT_SECONDS):
        while await log_length(db, document) > 30:
            await asyncio.sleep(0.05)
    assert (await alice.get(f"/documents/{document}/content")).body == editor.text


@pytest.fixture
def eager(monkeypatch: pytest.MonkeyPatch) -> None:
    """Low thresholds: logs count as long soon, and merged updates have no grace period."""
    monkeypatch.setattr("server.documents.logs.COMPACT_BYTES", 50_000)
    monkeypatch.setattr("server.documents.rooms.GRACE_SECONDS", 0)


async def put(actor: Actor, document: str, text: str) -> None:
    written = await actor.put(f"/documents/{document}/content", data=text.encode(), headers={"If-Match": "*"})
    assert written.status == 200, written


@pytest.mark.usefixtures("eager")
async def test_document_written_only_over_rest_is_compacted_too(alice: Actor, workspace: str, db: Database) -> None:
    document = await make_document(alice, workspace)
    texts = [f"{number}" * 20_000 for number in range(1, 8)]
    for text in texts:
        await put(alice, document, text)
    async with asyncio.timeout(WAIT_TIMEOUT_SECONDS):
        while await log_length(db, document) > 3:
            await asyncio.sleep(0.05)
    assert (await alice.get(f"/documents/{document}/content")).body == texts[-1]
    assert (await alice.get(f"/documents/{document}/versions/3"))["content"] == texts[1]


@pytest.mark.usefixtures("eager")
async def test_long_log_is_compacted_when_the_document_is_opened(alice: Actor, workspace: str, db: Database) -> None:
    document = await make_document(alice, workspace, content="x" * 60_000)
    opened = await Editor(alice, document).open()
    async with asyncio.timeout(WAIT_TIMEOUT_SECONDS):
        while await log_length(db, document):
            await asyncio.sleep(0.05)
    assert await opened.type("!") == 2


class SlowWorkshop(Workshop):
    """A process pool that works longer than the statement timeout, and until ``go``."""

    def __init__(self) -> None:
        super().__init__()
        self.begun, self.go = asyncio.Event(), asyncio.Event()

    async def do(self, work: Callable[..., Any], *arguments: Any, **how: Any) -> Any:
        self.begun.set()
        await asyncio.sleep(postgres.STATEMENT_TIMEOUT_SECONDS + 0.1)
        await self.go.wait()
        return await super().do(work, *arguments, **how)


async def test_compaction_may_exceed_the_statement_timeout(
    alice: Actor, bob: Actor, workspace: str, db: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(postgres, "STATEMENT_TIMEOUT_SECONDS", 3.0)
    document = await make_document(alice, workspace, content="0")
    for number in range(1, 4):
        await put(alice, document, f"{number}")
    log = await logs.read_log(db, UUID(document))
    workshop = SlowWorkshop()
    slowly = asyncio.ensure_future(compaction.compact(db, workshop, log, grace_seconds=0))
    await workshop.begun.wait()
    newest = await (await Editor(bob, document).open()).type("!")  # no edit waits for the compaction
    workshop.go.set()
    assert await slowly
    assert await log_length(db, document) == newest - log.version
    assert not await compaction.compact(db, Workshop(), log, grace_seconds=0), "another process has done it"
    assert (await alice.get(f"/documents/{document}/versions/3"))["content"] == "2"


async def test_compaction_batches_versions_by_memory(
    alice: Actor, workspace: str, db: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    document = await make_document(alice, workspace, content="0")
    for number in range(1, 10):
        await put(alice, document, f"{number}")
    monkeypatch.setattr(compaction, "MOST_TEXT_BYTES", 3 * (await logs.read_log(db, UUID(document))).bytes)
    assert await compacted(db, document)
    assert 3 <= await log_length(db, document) < 10
    while await log_length(db, document):
        assert await compacted(db, document)
    for version in range(1, 11):
        assert (await alice.get(f"/documents/{document}/versions/{version}"))["content"] == f"{version - 1}"


async def test_all_transports_reject_nul(alice: Actor, bob: Actor, workspace: str) -> None:
    document = await make_document(alice, workspace, content="text")
    hers, his = await Editor(alice, document).open(), await raw_socket(bob, document)
    with pytest.raises(ErrorReply) as refused:
        await hers.type("a\0b")
    assert refused.value.code == "validation_failed"
    await his.send_bytes(wire.sync(wire.UPDATE, updates.first("a\0b")))
    while (await his.receive(timeout=WAIT_TIMEOUT_SECONDS)).type is aiohttp.WSMsgType.BINARY:
        continue
    assert his.close_code == 4400
    assert (await alice.get(f"/documents/{document}/content")).body == "text"


async def test_nul_in_a_text_does_not_stop_compaction(alice: Actor, workspace: str, db: Database) -> None:
    """No transport accepts NUL; compaction removes it from an older log."""
    document = await make_document(alice, workspace, content="0")
    await logs.rewrite(db, Workshop(), UUID(document), author=UUID(alice.id), text="a\0b", cause="put")
    assert await compacted(db, document)
    assert (await alice.get(f"/documents/{document}/versions/2"))["content"] == "a\ufffdb"


class Between:
    """A database that runs a callback after its first statement."""

    def __init__(self, db: Database, happens: Callable[[], Awaitable[object]]) -> None:
        self._db, self._happens = db, happens
        self._is_first = True

    async def fetchrow(self, query: str, *arguments: Any) -> Any:
        row = await self._db.fetchrow(query, *arguments)
        if self._is_first:
            self._is_first = False
            await self._happens()
        return row

    async def fetch(self, query: str, *arguments: Any) -> Any:
        return await self._db.fetch(query, *arguments)


async def test_log_compacted_during_a_read_is_read_again(alice: Actor, workspace: str, db: Database) -> None:
    document = await make_document(alice, workspace, content="old")
    await put(alice, document, "new")

    async def happens() -> None:
        await put(alice, document, "newest")
        await compacted(db, document)

    assert await logs.text_now(Between(db, happens), Workshop(), UUID(document)) == ("newest", 3)  # type: ignore[arg-type]


async def test_log_is_read_in_pages_bounded_in_bytes(
    alice: Actor, workspace: str, db: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    document = await make_document(alice, workspace, content="a" * 5000)
    for number in range(4):
        await put(alice, document, f"{number}" * 1000)
    page = await store.read_log(db, document=UUID(document), after=0, limit=1000, limit_bytes=6500)
    assert [row["version"] for row in page] == [1, 2, 3]
    monkeypatch.setattr(logs, "PAGE_BYTES", 1)
    assert len((await logs.read_log(db, UUID(document))).tail) == 5


class Interrupted(Workshop):
    """A process pool whose first call runs a concurrent edit before its work."""

    def __init__(self, edit: Callable[[], Awaitable[object]]) -> None:
        super().__init__()
        self._edit: Callable[[], Awaitable[object]] | None = edit

    async def do(self, work: Callable[..., Any], *arguments: Any, **how: Any) -> Any:
        edit, self._edit = self._edit, None
        if edit is not None:
            await edit()
        return await super().do(work, *arguments, **how)


async def test_write_during_a_concurrent_edit_results_in_the_written_text(
    alice: Actor, bob: Actor, workspace: str, db: Database
) -> None:
    document = await make_document(alice, workspace, content="base")
    his = await Editor(bob, document).open()
    workshop = Interrupted(lambda: his.type("typed"))
    written = await logs.rewrite(db, workshop, UUID(document), author=UUID(alice.id), text="new", cause="put")
    assert written is not None
    assert (written.row["version"], written.row["size"]) == (3, 3)
    assert (await alice.get(f"/documents/{document}/versions/3"))["content"] == "new"
    assert (await alice.get(f"/documents/{document}/content")).body == "new"


async def test_work_on_a_document_does_not_count_against_the_store_deadline(
    alice: Actor, workspace: str, db: Database
) -> None:
    document = await make_document(alice, workspace, content="base")
    slow = Interrupted(lambda: asyncio.sleep(3))
    with store_deadline(3.2):
        assert await logs.rewrite(db, slow, UUID(document), author=UUID(alice.id), text="new", cause="put")


async def test_write_is_rejected_when_too_little_time_remains_to_confirm_it(
    alice: Actor, workspace: str, db: Database
) -> None:
    document = await make_document(alice, workspace, content="base")
    slowly = Between(db, lambda: asyncio.sleep(0.2))
    with store_deadline(0.6), pytest.raises(Unavailable):
        await logs.rewrite(slowly, Workshop(), UUID(document), author=UUID(alice.id), text="new", cause="put")  # type: ignore[arg-type]
    assert (await alice.get(f"/documents/{document}"))["version"] == 1


async def test_write_of_a_user_removed_meanwhile_is_rejected(alice: Actor, bob: Actor, db: Database) -> None:
    project = await alice.make_project()
    member = await alice.add(bob, project)
    document = await make_document(alice, await alice.make_workspace(project), content="hers")
    workshop = Interrupted(lambda: alice.delete(f"/projects/{project}/collaborators/{member}"))
    with pytest.raises(Forbidden):
        await logs.rewrite(db, workshop, UUID(document), author=UUID(bob.id), text="his", cause="put")
    assert (await alice.get(f"/documents/{document}"))["version"] == 1


async def test_heavy_work_runs_in_a_child_process(alice: Actor, workspace: str, db: Database) -> None:
    document = await make_document(alice, workspace)
    text = "".join(f"{number}\n" for number in range(100_000))
    assert len(text) > 2 * 256 * 1024
    await logs.rewrite(db, Workshop(), UUID(document), author=UUID(alice.id), text=text, cause="put")
    assert await compacted(db, document)
    assert (await alice.get(f"/documents/{document}/content")).body == text
