"""FILE_PROCESSING: the description of a workspace's files."""

import hashlib
from typing import Any

import pytest

from tests.actors import Actor
from tests.jobs.requests import submit_job

pytestmark = pytest.mark.usefixtures("worker")
FILES = {"src/main.py": "print('hé')\n# two words\n", "notes.txt": "one two  three", "empty.md": "", "odd.zzz": "x\n"}


async def workspace_with(actor: Actor, files: dict[str, str]) -> str:
    workspace = await actor.make_workspace()
    for path, content in files.items():
        response = await actor.post(f"/workspaces/{workspace}/documents", {"path": path, "content": content})
        assert response.status == 201, response
    return workspace


async def processed(actor: Actor, payload: dict[str, Any]) -> dict[str, Any]:
    job = await submit_job(actor, {"type": "FILE_PROCESSING", "payload": payload})
    return await actor.finished_job(job["id"])


async def test_every_file_is_described(alice: Actor) -> None:
    workspace = await workspace_with(alice, FILES)
    done = await processed(alice, {"workspaceId": workspace})
    assert (done["status"], done["workspaceId"]) == ("completed", workspace)
    files = {file["path"]: file for file in done["result"]["files"]}
    assert list(files) == sorted(FILES)
    raw = FILES["src/main.py"].encode()
    assert files["src/main.py"] == {
        "path": "src/main.py",
        "size": len(raw),
        "sha256": hashlib.sha256(raw).hexdigest(),
        "mimeType": "text/x-python",
        "encoding": "utf-8",
        "language": "Python",
        "lines": 2,
        "words": 4,
    }
    assert (files["notes.txt"]["lines"], files["notes.txt"]["words"], files["notes.txt"]["encoding"]) == (1, 3, "ascii")
    assert (files["empty.md"]["lines"], files["empty.md"]["language"]) == (0, "Markdown")
    assert files["odd.zzz"]["language"] is None
    totals = done["result"]["totals"]
    assert (totals["files"], totals["lines"], totals["words"]) == (4, 4, 8)
    assert {"language": "Python", "files": 1} in totals["languages"]


async def test_only_requested_files_are_processed(alice: Actor) -> None:
    workspace = await workspace_with(alice, FILES)
    done = await processed(alice, {"workspaceId": workspace, "paths": ["notes.txt"]})
    assert [file["path"] for file in done["result"]["files"]] == ["notes.txt"]
    missing = await processed(alice, {"workspaceId": workspace, "paths": ["notes.txt", "gone.txt"]})
    assert (missing["status"], missing["error"]["code"], missing["attempts"]) == ("failed", "not_found", 1)
    assert "gone.txt" in missing["error"]["message"]


async def test_workspace_without_access_is_not_processed(alice: Actor, bob: Actor) -> None:
    workspace = await alice.make_workspace()
    refused = await bob.post("/jobs", {"type": "FILE_PROCESSING", "payload": {"workspaceId": workspace}})
    assert refused.code == "not_found"


async def test_user_who_lost_the_role_before_the_run_gets_no_result(alice: Actor, bob: Actor) -> None:
    project = await alice.make_project()
    workspace = await alice.make_workspace(project)
    member = await alice.add(bob, project)
    payload = {"type": "FILE_PROCESSING", "payload": {"workspaceId": workspace}}
    job = (await submit_job(bob, payload, runAt="2100-01-01T00:00:00Z"))["id"]
    await alice.delete(f"/projects/{project}/collaborators/{member}")
    await bob.post(f"/jobs/{job}/cancel")
    await bob.post(f"/jobs/{job}/retry")
    done = await bob.finished_job(job)
    assert (done["status"], done["result"]) == ("failed", None)


async def test_program_from_a_document_sees_the_other_files_of_its_workspace(alice: Actor) -> None:
    files = {"main.py": "import data\nprint(data.TEXT, open('notes.txt').read())", "data.py": "TEXT = 'from data'"}
    workspace = await alice.make_workspace()
    ids = {}
    for path, content in {**files, "notes.txt": "noted"}.items():
        document = await alice.post(f"/workspaces/{workspace}/documents", {"path": path, "content": content})
        ids[path] = document["id"]
    request = {"type": "CODE_EXECUTION", "payload": {"language": "python", "documentId": ids["main.py"]}}
    job = await submit_job(alice, request)
    assert job["workspaceId"] == workspace
    done = await alice.finished_job(job["id"])
    assert done["result"]["stderr"] == ""
    assert done["result"]["stdout"] == "from data noted\n"


async def test_payload_and_request_must_refer_to_the_same_workspace(alice: Actor) -> None:
    one, other = await alice.make_workspace(), await alice.make_workspace()
    document = await alice.post(f"/workspaces/{one}/documents", {"path": "a.py", "content": "1"})
    for payload, scope in (
        ({"language": "python", "documentId": document["id"]}, {"workspaceId": other}),
        ({"language": "python", "documentId": document["id"], "workspaceId": other}, {}),
        ({"language": "python", "code": "1", "workspaceId": one}, {"workspaceId": other}),
    ):
        refused = await alice.post("/jobs", {"type": "CODE_EXECUTION", "payload": payload, **scope})
        assert (refused.status, refused.code) == (422, "validation_failed"), refused
