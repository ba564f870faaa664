"""Collaborative editing over the JSON socket."""

from base64 import b64encode

import pytest
from pycrdt import Doc, Map, Text

from server.documents import wire
from tests.actors import Actor
from tests.conftest import MakeServer
from tests.documents.editors import Editor, make_document
from tests.sockets import ErrorReply, wait_until_rejected


def coded(content: bytes) -> str:
    return b64encode(content).decode()


def state_of(client: int, state: str) -> str:
    return coded(wire.awareness_content([wire.Entry(client, 1, state)]))


async def test_two_users_edit_one_document(alice: Actor, bob: Actor, workspace: str) -> None:
    document = await make_document(alice, workspace, content="Hello")
    hers, his = await Editor(alice, document).open(), await Editor(bob, document).open()
    assert hers.text == his.text == "Hello"
    assert await hers.type(", world") == 2
    await his.until("Hello, world")
    assert await his.type("!") == 3
    await hers.until("Hello, world!")
    read = await alice.get(f"/documents/{document}")
    assert (read["version"], read["size"], read["updatedBy"]) == (3, 13, bob.id)
    assert (await alice.get(f"/documents/{document}/content")).body == "Hello, world!"


async def test_edit_reaches_other_processes_with_its_author(
    alice: Actor, bob: Actor, workspace: str, make_server: MakeServer
) -> None:
    document = await make_document(alice, workspace)
    his = await Editor(bob.at(await make_server()), document).open()
    hers = await Editor(alice, document).open()
    version = await hers.type("x")
    await his.socket.assert_push("document:update", documentId=document, userId=alice.id, version=version)
    await hers.socket.refute_push()


async def test_update_needs_an_open_document(alice: Actor, workspace: str) -> None:
    document = await make_document(alice, workspace)
    editor = await Editor(alice, document).open()
    await editor.socket.push("document:close", documentId=document)
    for event, data in (
        ("document:update", {"update": coded(editor.insert("x"))}),
        ("document:awareness", {"state": state_of(1, "{}")}),
        ("document:close", {}),
    ):
        with pytest.raises(ErrorReply) as refused:
            await editor.socket.push(event, documentId=document, **data)
        assert refused.value.code == "not_open"


async def test_client_receives_no_updates_of_a_closed_document(alice: Actor, bob: Actor, workspace: str) -> None:
    document = await make_document(alice, workspace)
    hers, his = await Editor(alice, document).open(), await Editor(bob, document).open()
    await his.socket.push("document:close", documentId=document)
    await hers.type("x")
    await his.socket.refute_push()


async def test_unknown_document_and_one_without_access_cannot_be_opened(
    alice: Actor, carol: Actor, workspace: str
) -> None:
    document = await make_document(alice, workspace)
    for actor, id in ((carol, document), (alice, "00000000-0000-4000-8000-000000000000")):
        with pytest.raises(ErrorReply) as refused:
            await Editor(actor, id).open()
        assert refused.value.code == "not_found"


async def test_viewer_receives_updates_but_cannot_edit(alice: Actor, carol: Actor, workspace: str) -> None:
    project = (await alice.get(f"/workspaces/{workspace}"))["projectId"]
    await alice.add(carol, project, role="VIEWER")
    document = await make_document(alice, workspace)
    hers, viewers = await Editor(alice, document).open(), await Editor(carol, document).open()
    with pytest.raises(ErrorReply) as refused:
        await viewers.type("mine")
    assert refused.value.code == "forbidden"
    await hers.socket.refute_push()
    await hers.type("hers")
    await viewers.socket.assert_push("document:update", userId=alice.id)
    assert (await alice.get(f"/documents/{document}/content")).body == "hers"
    assert (await alice.get(f"/documents/{document}"))["version"] == 2


@pytest.mark.parametrize(
    "update", [b"", b"\x00", b"\xff" * 10, b"\x01" * 5, b"\x80" * 1000, b"\x01\x01\xff\xff\xff\xff\x0f\x00"]
)
async def test_malformed_update_is_rejected_without_side_effects(
    alice: Actor, bob: Actor, workspace: str, update: bytes
) -> None:
    document = await make_document(alice, workspace, content="safe")
    hers, his = await Editor(alice, document).open(), await Editor(bob, document).open()
    with pytest.raises(ErrorReply) as refused:
        await hers.send(update)
    assert refused.value.code == "validation_failed"
    await his.type(" and sound")
    await hers.until("safe and sound")


@pytest.mark.parametrize("field", ["update", "state", "stateVector"])
async def test_invalid_base64_is_rejected(alice: Actor, workspace: str, field: str) -> None:
    document = await make_document(alice, workspace)
    editor = await Editor(alice, document).open()
    event = {"update": "document:update", "state": "document:awareness", "stateVector": "document:open"}[field]
    for hostile in ("!", "AAA", "AA==AA", 5):
        with pytest.raises(ErrorReply) as refused:
            await editor.socket.push(event, documentId=document, **{field: hostile})
        assert refused.value.code == "validation_failed"


async def test_hostile_state_vector_is_rejected(alice: Actor, workspace: str) -> None:
    document = await make_document(alice, workspace)
    socket = await alice.connect()
    for hostile in (b"\xff" * 20, b"\x05\x01", b"\xff\xff\xff\xff\x0f\x00"):
        with pytest.raises(ErrorReply) as refused:
            await socket.push("document:open", documentId=document, stateVector=coded(hostile))
        assert refused.value.code == "validation_failed"


async def test_update_before_its_predecessor_is_not_lost(alice: Actor, bob: Actor, workspace: str) -> None:
    document = await make_document(alice, workspace)
    hers = await Editor(alice, document).open()
    first, second = hers.insert("a"), hers.insert("b")
    await hers.send(second)
    his = await Editor(bob, document).open()
    assert his.text == ""
    await hers.send(first)
    await his.until("ab")
    assert (await alice.get(f"/documents/{document}/content")).body == "ab"


async def test_resent_update_is_acknowledged_without_a_new_version(alice: Actor, bob: Actor, workspace: str) -> None:
    document = await make_document(alice, workspace)
    hers, his = await Editor(alice, document).open(), await Editor(bob, document).open()
    update = hers.insert("once")
    assert [await hers.send(each) for each in (update, update, b"\x00\x00")] == [2, 2, 2]
    await his.until("once")
    await his.socket.refute_push()
    assert (await alice.get(f"/documents/{document}"))["version"] == 2


async def test_opening_again_with_a_state_vector_returns_only_missing_updates(alice: Actor, workspace: str) -> None:
    document = await make_document(alice, workspace, content="x" * 10_000)
    editor = await Editor(alice, document).open()
    again = await editor.socket.push("document:open", documentId=document, stateVector=coded(editor.doc.get_state()))
    assert len(again["update"]) < 100


async def test_awareness_reaches_other_processes_and_late_editors(
    alice: Actor, bob: Actor, carol: Actor, workspace: str, make_server: MakeServer
) -> None:
    elsewhere = await make_server()
    document = await make_document(alice, workspace)
    hers, his = await Editor(alice, document).open(), await Editor(bob.at(elsewhere), document).open()
    await hers.socket.push("document:awareness", documentId=document, state=state_of(7, '{"cursor":3}'))
    seen = await his.socket.assert_push("document:awareness", documentId=document, userId=alice.id)
    late = await Editor(bob.at(elsewhere), document).open()
    assert (await late.socket.assert_push("document:awareness", userId=alice.id))["state"] == seen["state"]
    third = await Editor(bob.at(await make_server()), document).open()
    assert (await third.socket.assert_push("document:awareness", userId=alice.id))["state"] == seen["state"]
    await hers.socket.close()
    gone = await his.socket.assert_push("document:awareness", userId=alice.id)
    assert gone["state"] != seen["state"]


async def test_editors_of_other_types_than_text_sync_across_two_processes(
    alice: Actor, bob: Actor, workspace: str, make_server: MakeServer
) -> None:
    document = await make_document(alice, workspace)
    hers, his = await Editor(alice, document).open(), await Editor(bob.at(await make_server()), document).open()
    for number in range(3):
        for editor, other in ((hers, his), (his, hers)):
            before = editor.doc.get_state()
            editor.doc.get("values", type=Map)[f"{editor.actor.name}{number}"] = Map({"deep": [number]})
            await editor.send(editor.doc.get_update(before))
            await editor.type(".")
            await other.until(editor.text)
            assert other.doc.get("values", type=Map).to_py() == editor.doc.get("values", type=Map).to_py()


async def test_opening_again_with_an_invalid_state_vector_keeps_the_document_open(alice: Actor, workspace: str) -> None:
    document = await make_document(alice, workspace)
    editor = await Editor(alice, document).open()
    with pytest.raises(ErrorReply, match="validation_failed"):
        await editor.socket.push("document:open", documentId=document, stateVector=coded(b"\xff" * 20))
    assert await editor.type("still open") == 2


@pytest.mark.usefixtures("no_periodic_recheck")
async def test_removed_collaborator_loses_the_open_document(alice: Actor, bob: Actor, make_server: MakeServer) -> None:
    project = await alice.make_project()
    member = await alice.add(bob, project)
    document = await make_document(alice, await alice.make_workspace(project))
    hers, his = await Editor(alice, document).open(), await Editor(bob.at(await make_server()), document).open()
    await alice.delete(f"/projects/{project}/collaborators/{member}")
    await his.socket.assert_push("ACCESS_REVOKED", documentId=document, reason="removed", userId=alice.id)
    with pytest.raises(ErrorReply) as refused:
        await his.type("still here?")
    assert refused.value.code in ("not_found", "not_open")
    await hers.type("alone")
    await his.socket.refute_push()
    assert (await alice.get(f"/documents/{document}/content")).body == "alone"


@pytest.mark.usefixtures("no_periodic_recheck")
async def test_user_demoted_to_viewer_cannot_edit(alice: Actor, bob: Actor, make_server: MakeServer) -> None:
    project = await alice.make_project()
    member = await alice.add(bob, project)
    document = await make_document(alice, await alice.make_workspace(project))
    his = await Editor(bob.at(await make_server()), document).open()
    await alice.patch(f"/projects/{project}/collaborators/{member}", {"role": "VIEWER"})
    await wait_until_rejected(lambda: his.type("x"), "forbidden")
    hers = await Editor(alice, document).open()
    await hers.type("read this")
    await his.socket.assert_push("document:update", userId=alice.id)


@pytest.mark.usefixtures("no_periodic_recheck")
@pytest.mark.parametrize("what", ["documents", "workspaces", "projects"])
async def test_deleted_document_is_closed_on_every_process(
    alice: Actor, bob: Actor, make_server: MakeServer, what: str
) -> None:
    project = await alice.make_project(bob)
    workspace = await alice.make_workspace(project)
    document = await make_document(alice, workspace)
    his = await Editor(bob.at(await make_server()), document).open()
    ids = {"documents": document, "workspaces": workspace, "projects": project}
    await alice.delete(f"/{what}/{ids[what]}")
    await his.socket.assert_push("ACCESS_REVOKED", documentId=document, reason="deleted")
    with pytest.raises(ErrorReply) as refused:
        await his.type("x")
    assert refused.value.code in ("not_found", "not_open")


async def test_edit_beyond_the_maximum_document_size_is_rejected(
    alice: Actor, workspace: str, make_server: MakeServer
) -> None:
    generous = await make_server(ws_max_message_bytes=20 << 20)
    document = await make_document(alice, workspace)
    editor = await Editor(alice.at(generous), document).open()
    version = await editor.type("x" * (6 << 20))
    other: Doc[Text] = Doc()
    other.get("content", type=Text).insert(0, "y" * (6 << 20))
    with pytest.raises(ErrorReply) as refused:
        await editor.send(other.get_update())
    assert refused.value.code == "too_large"
    assert await editor.type("small") == version + 1
