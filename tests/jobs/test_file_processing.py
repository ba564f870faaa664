"""FILE_PROCESSING: what a workspace's files are."""

import hashlib
from typing import Any

import pytest

from tests.actors import Actor
from tests.jobs.asking import ask

pytestmark = pytest.mark.usefixtures("worker")
FILES = {"src/main.py": "print('hé')\n# two words\n", "notes.txt": "one two  three", "empty.md": "", "odd.zzz": "x\n"}


async def workspace_with(who: Actor, files: dict[str, str]) -> str:
    workspace = await who.make_workspace()
    for path, content in files.items():
        made = await who.post(f"/workspaces/{workspace}/documents", {"path": path, "content": content})
        assert made.status == 201, made
    return workspace


async def processed(who: Actor, payload: dict[str, Any]) -> dict[str, Any]:
    job = await ask(who, {"type": "FILE_PROCESSING", "payload": payload})
    return await who.finished_job(job["id"])


async def test_every_file_is_measured_and_recognised(alice: Actor) -> None:
    workspace = await workspace_with(alice, FILES)
    done = await processed(alice, {"workspaceId": workspace})
    assert (done["status"], done["workspaceId"]) == ("completed", workspace)
    files = {each["path"]: each for each in done["result"]["files"]}
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


async def test_only_the_files_asked_for(alice: Actor) -> None:
    workspace = await workspace_with(alice, FILES)
    done = await processed(alice, {"workspaceId": workspace, "paths": ["notes.txt"]})
    assert [each["path"] for each in done["result"]["files"]] == ["notes.txt"]
    missing = await processed(alice, {"workspaceId": workspace, "paths": ["notes.txt", "gone.txt"]})
    assert (missing["status"], missing["error"]["code"], missing["attempts"]) == ("failed", "not_found", 1)
    assert "gone.txt" in missing["error"]["message"]


async def test_a_strangers_workspace_is_not_processed(alice: Actor, bob: Actor) -> None:
    workspace = await alice.make_workspace()
    refused = await bob.post("/jobs", {"type": "FILE_PROCESSING", "payload": {"workspaceId": workspace}})
    assert refused.code == "not_found"


async def test_who_lost_the_role_while_the_job_waited_gets_nothing(alice: Actor, bob: Actor) -> None:
    project = await alice.make_project()
    workspace = await alice.make_workspace(project)
    member = await alice.add(bob, project)
    payload = {"type": "FILE_PROCESSING", "payload": {"workspaceId": workspace}}
    job = (await ask(bob, payload, runAt="2100-01-01T00:00:00Z"))["id"]
    await alice.delete(f"/projects/{project}/collaborators/{member}")
    await bob.post(f"/jobs/{job}/cancel")
    await bob.post(f"/jobs/{job}/retry")
    done = await bob.finished_job(job)
    assert (done["status"], done["result"]) == ("failed", None)


async def test_a_program_out_of_a_document_sees_the_files_beside_it(alice: Actor) -> None:
    files = {"main.py": "import data\nprint(data.TEXT, open('notes.txt').read())", "data.py": "TEXT = 'from data'"}
    workspace = await alice.make_workspace()
    ids = {}
    for path, content in {**files, "notes.txt": "noted"}.items():
        made = await alice.post(f"/workspaces/{workspace}/documents", {"path": path, "content": content})
        ids[path] = made["id"]
    asked = {"type": "CODE_EXECUTION", "payload": {"language": "python", "documentId": ids["main.py"]}}
    job = await ask(alice, asked)
    assert job["workspaceId"] == workspace
    done = await alice.finished_job(job["id"])
    assert done["result"]["stderr"] == ""
    assert done["result"]["stdout"] == "from data noted\n"


async def test_what_the_payload_and_the_request_name_must_belong_together(alice: Actor) -> None:
    one, other = await alice.make_workspace(), await alice.make_workspace()
    made = await alice.post(f"/workspaces/{one}/documents", {"path": "a.py", "content": "1"})
    for payload, place in (
        ({"language": "python", "documentId": made["id"]}, {"workspaceId": other}),
        ({"language": "python", "documentId": made["id"], "workspaceId": other}, {}),
        ({"language": "python", "code": "1", "workspaceId": one}, {"workspaceId": other}),
    ):
        refused = await alice.post("/jobs", {"type": "CODE_EXECUTION", "payload": payload, **place})
        assert (refused.status, refused.code) == (422, "validation_failed"), refused
