"""Documents over REST."""

import io

import pytest

from tests.actors import Actor
from tests.documents.editors import Editor, make_document

TEXT = {"Content-Type": "text/plain"}


async def put(actor: Actor, document: str, text: str | bytes, *, match: str | None = "*", **headers: str):
    given = TEXT | ({"If-Match": match} if match else {}) | headers
    raw = text if isinstance(text, bytes) else text.encode()
    return await actor.put(f"/documents/{document}/content", data=io.BytesIO(raw), headers=given)


async def test_document_is_created_read_listed_renamed_and_deleted(alice: Actor, workspace: str) -> None:
    made = await alice.post(f"/workspaces/{workspace}/documents", {"path": "src/main.py", "content": "print('é')\n"})
    assert made.status == 201
    assert made.headers["Location"] == f"/api/v1/documents/{made['id']}"
    assert made.body.keys() == {
        *("id", "workspaceId", "path", "mimeType", "size", "version", "createdAt", "updatedAt", "updatedBy")
    }
    assert (made["path"], made["mimeType"], made["size"], made["version"]) == ("src/main.py", "text/x-python", 12, 1)
    assert (made["workspaceId"], made["updatedBy"]) == (workspace, alice.id)
    read = await alice.get(f"/documents/{made['id']}")
    assert read.body == made.body
    assert read.headers["ETag"] == made.headers["ETag"]
    listed = await alice.get(f"/workspaces/{workspace}/documents")
    assert listed.body == {"items": [made.body], "nextCursor": None}
    renamed = await alice.patch(f"/documents/{made['id']}", {"path": "README.md"})
    assert (renamed.status, renamed["path"], renamed["mimeType"]) == (200, "README.md", "text/markdown")
    assert (await alice.delete(f"/documents/{made['id']}")).status == 204
    assert (await alice.get(f"/documents/{made['id']}")).code == "not_found"


async def test_documents_are_paginated_in_the_order_of_their_paths(alice: Actor, workspace: str) -> None:
    for path in ("b", "a/z", "a-z", "c", "B"):
        await make_document(alice, workspace, path=path)
    first = await alice.get(f"/workspaces/{workspace}/documents?limit=3")
    rest = await alice.get(f"/workspaces/{workspace}/documents?limit=3&cursor={first['nextCursor']}")
    assert [each["path"] for each in first["items"] + rest["items"]] == ["B", "a-z", "a/z", "b", "c"]
    assert rest["nextCursor"] is None


async def test_path_of_another_document_is_rejected(alice: Actor, workspace: str) -> None:
    await make_document(alice, workspace, path="a")
    other = await make_document(alice, workspace, path="b")
    again = await alice.post(f"/workspaces/{workspace}/documents", {"path": "a"})
    assert (again.status, again.code) == (409, "path_taken")
    renamed = await alice.patch(f"/documents/{other}", {"path": "a"})
    assert (renamed.status, renamed.code) == (409, "path_taken")


@pytest.mark.parametrize("path", ["", "/a", "a/", "a//b", "..", "a/../b", "./a", "é" * 257, 5, None])
async def test_invalid_path_is_rejected(alice: Actor, workspace: str, path: object) -> None:
    refused = await alice.post(f"/workspaces/{workspace}/documents", {"path": path})
    assert (refused.status, refused.code) == (422, "validation_failed")


async def test_text_is_read_and_written(alice: Actor, workspace: str) -> None:
    document = await make_document(alice, workspace, content="one\ntwo\n")
    read = await alice.get(f"/documents/{document}/content")
    assert (read.body, read.headers["Content-Type"]) == ("one\ntwo\n", "text/x-python; charset=utf-8")
    written = await put(alice, document, "one\nthree\n", match=read.headers["ETag"])
    assert (written.status, written["size"], written["version"]) == (200, 10, 2)
    again = await alice.get(f"/documents/{document}/content")
    assert (again.body, again.headers["ETag"]) == ("one\nthree\n", written.headers["ETag"])
    same = await alice.get(f"/documents/{document}/content", headers={"If-None-Match": again.headers["ETag"]})
    assert same.status == 304


async def test_write_requires_a_matching_etag(alice: Actor, bob: Actor, workspace: str) -> None:
    document = await make_document(alice, workspace)
    seen = (await alice.get(f"/documents/{document}/content")).headers["ETag"]
    blind = await put(alice, document, "x", match=None)
    assert (blind.status, blind.code) == (428, "precondition_required")
    assert (await put(bob, document, "bob's", match=seen)).status == 200
    late = await put(alice, document, "alice's", match=seen)
    assert (late.status, late.code) == (412, "precondition_failed")
    assert (await put(alice, document, "alice's", match="*")).status == 200
    assert (await bob.get(f"/documents/{document}/content")).body == "alice's"


@pytest.mark.parametrize(
    ("text", "headers", "expected"),
    [
        (b"\xff", {}, (422, "validation_failed")),
        (b"a\0b", {}, (422, "validation_failed")),
        (b"x", {"Content-Type": "text/plain; charset=latin-1"}, (415, "unsupported_media_type")),
        (b"x" * (10 * 1024 * 1024 + 1), {}, (413, "too_large")),
    ],
)
async def test_invalid_text_is_rejected(alice: Actor, workspace: str, text: bytes, headers, expected) -> None:
    document = await make_document(alice, workspace, content="still here")
    refused = await put(alice, document, text, **headers)
    assert (refused.status, refused.code) == expected
    assert (await alice.get(f"/documents/{document}/content")).body == "still here"


async def test_text_of_several_megabytes_is_stored(alice: Actor, workspace: str) -> None:
    document = await make_document(alice, workspace)
    text = "0123456789abcdé\n" * 400_000
    assert (await put(alice, document, text)).status == 200
    assert (await alice.get(f"/documents/{document}/content")).body == text
    changed = text[:1_000_000] + "here" + text[1_000_000:]
    assert (await put(alice, document, changed)).status == 200
    assert (await alice.get(f"/documents/{document}/content")).body == changed


async def test_editor_receives_a_written_text_as_an_edit(alice: Actor, bob: Actor, workspace: str) -> None:
    document = await make_document(alice, workspace, content="one\ntwo\nthree\n")
    editor = await Editor(bob, document).open()
    await put(alice, document, "one\n2\nthree\n")
    heard = await editor.socket.assert_push("document:update", userId=alice.id, version=2)
    assert len(heard["update"]) < 100
    editor.socket.received.append({"event": "document:update", "data": heard})
    await editor.until("one\n2\nthree\n")


async def test_every_write_and_restore_can_be_read_and_restored(alice: Actor, bob: Actor, workspace: str) -> None:
    document = await make_document(alice, workspace, content="first")
    await put(bob, document, "second")
    await put(alice, document, "third")
    restored = await bob.post(f"/documents/{document}/restore", {"version": 2})
    assert (restored.status, restored["version"], restored["updatedBy"]) == (200, 4, bob.id)
    assert (await alice.get(f"/documents/{document}/content")).body == "second"
    listed = await alice.get(f"/documents/{document}/versions")
    assert [(each["version"], each["cause"], each["createdBy"], each["size"]) for each in listed["items"]] == [
        (4, "restore", bob.id, 6),
        (3, "put", alice.id, 5),
        (2, "put", bob.id, 6),
        (1, "created", alice.id, 5),
    ]
    texts = [(await alice.get(f"/documents/{document}/versions/{n}"))["content"] for n in (1, 2, 3, 4)]
    assert texts == ["first", "second", "third", "second"]
    assert (await alice.post(f"/documents/{document}/restore", {"version": 9})).code == "not_found"


@pytest.mark.parametrize("version", ["0", "7", "x", "-1", "1e3", "99999999999999999999999", "²"])
async def test_unknown_version_is_not_found(alice: Actor, workspace: str, version: str) -> None:
    document = await make_document(alice, workspace)
    assert (await alice.get(f"/documents/{document}/versions/{version}")).code == "not_found"


async def test_viewer_can_read_but_not_change_documents(alice: Actor, carol: Actor, workspace: str) -> None:
    project = (await alice.get(f"/workspaces/{workspace}"))["projectId"]
    await alice.add(carol, project, role="VIEWER")
    document = await make_document(alice, workspace, content="hers")
    assert (await carol.get(f"/documents/{document}/content")).body == "hers"
    for refused in (
        await carol.post(f"/workspaces/{workspace}/documents", {"path": "x"}),
        await carol.patch(f"/documents/{document}", {"path": "x"}),
        await carol.delete(f"/documents/{document}"),
        await put(carol, document, "mine"),
        await carol.post(f"/documents/{document}/restore", {"version": 1}),
    ):
        assert (refused.status, refused.code) == (403, "forbidden")


async def test_user_without_access_gets_not_found(alice: Actor, carol: Actor, workspace: str) -> None:
    document = await make_document(alice, workspace)
    for refused in (
        await carol.get(f"/documents/{document}"),
        await carol.get(f"/documents/{document}/content"),
        await carol.get(f"/workspaces/{workspace}/documents"),
        await put(carol, document, "x"),
        await carol.get("/documents/not-an-id"),
    ):
        assert (refused.status, refused.code) == (404, "not_found")


async def test_changes_of_documents_are_broadcast_to_the_workspace(alice: Actor, bob: Actor, workspace: str) -> None:
    room = await bob.connect(workspace)
    document = await make_document(alice, workspace, path="a.txt")
    await room.assert_push("DOCUMENT_CREATED", documentId=document, path="a.txt", version=1, userId=alice.id)
    await alice.patch(f"/documents/{document}", {"path": "b.txt"})
    await room.assert_push("DOCUMENT_RENAMED", documentId=document, path="b.txt", userName="Alice")
    await put(alice, document, "x")
    await room.assert_push("DOCUMENT_CHANGED", documentId=document, path="b.txt", version=2)
    await alice.delete(f"/documents/{document}")
    await room.assert_push("DOCUMENT_DELETED", documentId=document, path="b.txt")


async def test_changed_document_has_a_new_etag(alice: Actor, workspace: str) -> None:
    document = await make_document(alice, workspace)
    first = await alice.get(f"/documents/{document}")
    await put(alice, document, "x")
    headers = {"If-Match": first.headers["ETag"]}
    assert (await alice.patch(f"/documents/{document}", {"path": "y"}, headers=headers)).code == "precondition_failed"
    assert (await alice.delete(f"/documents/{document}", headers=headers)).code == "precondition_failed"
    assert (await alice.get(f"/documents/{document}", headers={"If-None-Match": first.headers["ETag"]})).status == 200
