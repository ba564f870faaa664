"""Faults of document paths that users saw: in the API, in programs, in archives."""

import asyncio
import io
import json
import tarfile
import unicodedata
import zipfile
from typing import Any

import asyncpg
import pytest

from server.documents.paths import MAX_PATH_BYTES
from tests.actors import Actor, Response
from tests.conftest import MakeServer
from tests.documents.editors import make_document
from tests.jobs.conftest import worker  # noqa: F401 - a fixture
from tests.jobs.requests import program_job, submit_job

COMPOSED, DECOMPOSED = (unicodedata.normalize(form, "caf\u00e9/\u1e69.py") for form in ("NFC", "NFD"))
INVALID_PATHS = ("a\nb", "a\x1bb", "..\\..\\..\\evil.bat", "x" * 256, DECOMPOSED, "src")
VALID_PATHS = {"main.py": "print(1)", "src/deep/er.py": "print(2)", "src-x": "3", COMPOSED: "4"}


async def post(actor: Actor, workspace: str, path: str) -> Response:
    return await actor.post(f"/workspaces/{workspace}/documents", {"path": path, "content": path[:9]})


@pytest.mark.parametrize(
    "path", ["a\\b", "\\", "..\\..\\evil.bat", "a\nb", "a\rb", "a\tb", "a\x1bb", "a\x7fb", "a\x85b", "a/\x01/b"]
)
async def test_a_path_with_a_backslash_or_a_control_character_was_accepted(alice: Actor, path: str) -> None:
    workspace = await alice.make_workspace()
    document = await make_document(alice, workspace)
    for refused in (await post(alice, workspace, path), await alice.patch(f"/documents/{document}", {"path": path})):
        assert (refused.status, refused.code) == (422, "validation_failed")
        assert refused["details"][0]["field"] == "path"


@pytest.mark.parametrize(
    "path", ["a b", " a", "a\u202eb", "\U0001f469\u200d\U0001f467.py", "C:x", "-rf", "\u2215", "a..b", "..."]
)
async def test_every_other_character_of_a_path_is_preserved(alice: Actor, path: str) -> None:
    assert (await post(alice, await alice.make_workspace(), path))["path"] == path


async def test_a_mac_and_a_pc_created_two_documents_with_one_name(alice: Actor) -> None:
    workspace = await alice.make_workspace()
    created = await post(alice, workspace, DECOMPOSED)
    assert (created.status, created["path"]) == (201, COMPOSED)
    for path in (COMPOSED, DECOMPOSED):
        assert (await post(alice, workspace, path)).code == "path_taken"
    other = await make_document(alice, workspace, path="other")
    assert (await alice.patch(f"/documents/{other}", {"path": DECOMPOSED})).code == "path_taken"
    renamed = await alice.patch(f"/documents/{other}", {"path": f"x/{DECOMPOSED}"})
    assert (renamed.status, renamed["path"]) == (200, f"x/{COMPOSED}")


async def test_the_length_of_a_path_is_counted_in_bytes_of_its_stored_form(alice: Actor) -> None:
    workspace = await alice.make_workspace()
    longest = "\u00e9" * (MAX_PATH_BYTES // 2)
    assert (await post(alice, workspace, unicodedata.normalize("NFD", longest)))["path"] == longest
    assert (await post(alice, workspace, "x" + longest)).status == 422
    assert (await post(alice, workspace, "\u0344" * (MAX_PATH_BYTES // 2))).status == 422  # longer in NFC


async def test_a_document_was_a_folder_of_another_document(alice: Actor) -> None:
    workspace = await alice.make_workspace()
    existing = ["dir", "src/a/b.py"]
    for path in existing:
        await make_document(alice, workspace, path=path)
    free = await make_document(alice, workspace, path="free")
    for path in ("dir/file", "dir/deep/er/file", "src", "src/a", "src/a/b.py/c", *existing):
        refused = await post(alice, workspace, path)
        assert (refused.status, refused.code) == (409, "path_taken"), path
        assert (await alice.patch(f"/documents/{free}", {"path": path})).code == "path_taken", path
    for path in ("dir-x", "dir.x", "dir0", "di", "src/a/b", "src/a/c.py", "src0", "Dir/file"):
        assert (await post(alice, workspace, path)).status == 201, path
    elsewhere = await alice.make_workspace()
    assert (await post(alice, elsewhere, "dir/file")).status == 201


async def test_a_document_moves_into_a_folder_of_its_own_name_and_back(alice: Actor) -> None:
    workspace = await alice.make_workspace()
    document = await make_document(alice, workspace, path="dir")
    for path in ("dir/file", "dir/file/deeper", "dir", "dir"):
        assert (await alice.patch(f"/documents/{document}", {"path": path}))["path"] == path
    await alice.delete(f"/documents/{document}")
    assert (await post(alice, workspace, "dir/file")).status == 201


async def test_a_document_and_a_folder_with_one_name_were_created_at_once(
    alice: Actor, make_server: MakeServer
) -> None:
    workspace, here = await alice.make_workspace(), [alice, alice.at(await make_server())]
    for attempt in range(10):
        names = [f"{attempt}", f"{attempt}/file", f"{attempt}/deep/file", f"{attempt}"]
        responses = await asyncio.gather(*(post(here[n % 2], workspace, name) for n, name in enumerate(names)))
        assert {answer.status for answer in responses} == {201, 409}
        created = [answer["path"] for answer in responses if answer.status == 201]
        assert len(created) == 1 or f"{attempt}" not in created
    documents = [await make_document(alice, workspace, path=f"free{n}") for n in range(2)]
    for attempt in range(10):
        names = [f"r{attempt}", f"r{attempt}/file"]
        renamed = await asyncio.gather(
            *(here[n].patch(f"/documents/{documents[n]}", {"path": name}) for n, name in enumerate(names))
        )
        assert sorted(answer.status for answer in renamed) == [200, 409]


async def insert_document(database_url: str, actor: Actor, workspace: str, path: str) -> str:
    """Create a document with a path that only an older version accepted; return its id."""
    document = await make_document(actor, workspace, path=f"old{abs(hash(path))}", content=path[:9])
    connection = await asyncpg.connect(database_url)
    try:
        await connection.execute("SET session_replication_role = replica")  # without triggers
        await connection.execute("UPDATE documents SET path = $2 WHERE id = $1::text::uuid", document, path)
    finally:
        await connection.close()
    return document


@pytest.fixture
async def old_workspace(alice: Actor, database_url: str) -> str:
    """Create a workspace with valid paths and with paths that are no longer accepted; return its id."""
    workspace = await alice.make_workspace()
    for path, content in VALID_PATHS.items():
        await make_document(alice, workspace, path=path, content=content)
    for path in INVALID_PATHS:
        await insert_document(database_url, alice, workspace, path)
    return workspace


async def test_old_paths_stay_readable_and_can_be_renamed(alice: Actor, old_workspace: str) -> None:
    listed = (await alice.get(f"/workspaces/{old_workspace}/documents"))["items"]
    assert {document["path"] for document in listed} == {*VALID_PATHS, *INVALID_PATHS}
    for document in listed:
        assert (await alice.get(f"/documents/{document['id']}"))["path"] == document["path"]
        assert (await alice.get(f"/documents/{document['id']}/content")).status == 200
    hostile = [document["id"] for document in listed if document["path"] in INVALID_PATHS]
    for number, document in enumerate(hostile):
        assert (await alice.patch(f"/documents/{document}", {"path": f"new/{number}"})).status == 200


async def run_to_completion(actor: Actor, body: dict[str, Any]) -> dict[str, Any]:
    job = await actor.finished_job((await submit_job(actor, body))["id"])
    assert job["status"] == "completed", job
    result: dict[str, Any] = job["result"]
    return result


def skipped_paths(warnings: list[str], path: str = "") -> list[str]:
    """Return the skipped paths of these warnings, sorted, without the prefix ``path``."""
    return sorted(warning.removeprefix('Skipped "').partition('": ')[0].removeprefix(path) for warning in warnings)


ESCAPED_INVALID_PATHS = sorted(
    path.replace("\\", "\\\\").replace("\n", "\\n").replace("\x1b", "\\u001b") for path in INVALID_PATHS
)
WALK = """
import os, json
paths = (os.path.join(folder, name) for folder, _, names in os.walk("../files") for name in names)
print(json.dumps(sorted(os.path.relpath(path, "../files") for path in paths)))
"""


@pytest.mark.usefixtures("worker")
async def test_a_program_did_not_run_in_a_workspace_with_such_a_path(alice: Actor, old_workspace: str) -> None:
    result = await run_to_completion(alice, program_job(WALK, workspaceId=old_workspace))
    assert (result["exitCode"], result["stdout"]) == (0, f"{json.dumps(sorted(VALID_PATHS))}\n")
    assert skipped_paths(result["warnings"]) == ESCAPED_INVALID_PATHS
    assert "control characters" in "".join(result["warnings"])
    assert (await run_to_completion(alice, program_job("print(1)")))["warnings"] == []


@pytest.mark.usefixtures("worker")
async def test_files_of_such_a_workspace_were_not_processed(alice: Actor, old_workspace: str) -> None:
    body = {"type": "FILE_PROCESSING", "payload": {"workspaceId": old_workspace}}
    result = await run_to_completion(alice, body)
    assert {file["path"] for file in result["files"]} == VALID_PATHS.keys()
    assert skipped_paths(result["warnings"]) == ESCAPED_INVALID_PATHS
    body["payload"]["paths"] = ["main.py", DECOMPOSED, "a\nb"]
    result = await run_to_completion(alice, body)
    assert {file["path"] for file in result["files"]} == {"main.py", COMPOSED}
    assert skipped_paths(result["warnings"]) == sorted(["a\\nb", DECOMPOSED])


@pytest.mark.usefixtures("worker")
@pytest.mark.parametrize("format", ["zip", "tar.gz"])
async def test_archives_of_such_a_workspace_could_not_be_unpacked(
    alice: Actor, old_workspace: str, format: str
) -> None:
    await make_document(alice, old_workspace, path="C:/Windows/evil.dll")
    payload = {"workspaceId": old_workspace, "format": format}
    result = await run_to_completion(alice, {"type": "EXPORT", "payload": payload})
    assert await archive_names(alice, result["artifact"]["url"]) == VALID_PATHS.keys()
    assert skipped_paths(result["warnings"]) == sorted([*ESCAPED_INVALID_PATHS, "C:/Windows/evil.dll"])
    project = (await alice.get(f"/workspaces/{old_workspace}"))["projectId"]
    await alice.patch(f"/workspaces/{old_workspace}", {"name": "\U0001f469" * 100})
    result = await run_to_completion(alice, {"type": "EXPORT", "payload": {"projectId": project, "format": format}})
    folder = "\U0001f469" * 50
    assert await archive_names(alice, result["artifact"]["url"]) == {
        f"{folder}/{path}" for path in [*VALID_PATHS, "C:/Windows/evil.dll"]
    }
    assert skipped_paths(result["warnings"], f"{folder}/") == ESCAPED_INVALID_PATHS


async def archive_names(actor: Actor, url: str) -> set[str]:
    async with actor.http.get(actor.base + url, headers=actor.headers) as answer:
        raw = await answer.read()
    if url.endswith(".zip"):
        return set(zipfile.ZipFile(io.BytesIO(raw)).namelist())
    with tarfile.open(fileobj=io.BytesIO(raw)) as archive:
        return set(archive.getnames())


@pytest.mark.usefixtures("worker")
async def test_thousands_of_such_paths_produce_a_short_warning(alice: Actor, database_url: str) -> None:
    workspace = await alice.make_workspace()
    await insert_document(database_url, alice, workspace, "a\nb")
    connection = await asyncpg.connect(database_url)
    try:
        await connection.execute(
            """
            INSERT INTO documents (workspace_id, path, mime_type, size)
            SELECT $1::text::uuid, chr(7) || n, 'text/plain', 0 FROM generate_series(1, 2500) AS n
            """,
            workspace,
        )
    finally:
        await connection.close()
    warnings = (await run_to_completion(alice, program_job("print(1)", workspaceId=workspace)))["warnings"]
    assert len(warnings) == 21
    assert warnings[-1] == "Skipped 2481 more files."
