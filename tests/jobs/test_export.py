"""EXPORT: the files of a workspace or project as one artifact, downloaded as a whole or in ranges."""

import asyncio
import hashlib
import io
import json
import random
import re
import string
import tarfile
import zipfile
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import aiohttp
import pymongo
import pytest

from server.devstack.stack import Stack
from tests.actors import Actor
from tests.conftest import environment_of
from tests.jobs.requests import submit_job
from tests.processes import Processes

FILES = {"main.py": "print('hé')\n", "docs/read me.md": "# Hello\n", "empty.txt": ""}


async def workspace_with(actor: Actor, files: dict[str, str], project: str | None = None) -> str:
    workspace = await actor.make_workspace(project)
    for path, content in files.items():
        response = await actor.post(f"/workspaces/{workspace}/documents", {"path": path, "content": content})
        assert response.status == 201, response
    return workspace


async def exported(actor: Actor, **payload: Any) -> dict[str, Any]:
    """Run an export and return the artifact in its result."""
    done = await actor.finished_job(
        (await submit_job(actor, {"type": "EXPORT", "payload": payload}))["id"], seconds=120
    )
    assert done["status"] == "completed", done
    artifact: dict[str, Any] = done["result"]["artifact"]
    return artifact


async def download(actor: Actor, artifact: dict[str, Any], **headers: str) -> tuple[int, bytes, Any]:
    async with actor.http.get(actor.base + artifact["url"], headers=actor.headers | headers) as answer:
        return answer.status, await answer.read(), answer.headers


def unzipped(raw: bytes) -> dict[str, str]:
    with zipfile.ZipFile(io.BytesIO(raw)) as archive:
        assert archive.testzip() is None
        return {name: archive.read(name).decode() for name in archive.namelist()}


def untarred(raw: bytes) -> dict[str, str]:
    with tarfile.open(fileobj=io.BytesIO(raw), mode="r:gz") as archive:
        return {member.name: archive.extractfile(member).read().decode() for member in archive}  # type: ignore[union-attr]


def unpacked(raw: bytes) -> dict[str, str]:
    return {document["path"]: document["content"] for document in json.loads(raw)["documents"]}


@pytest.mark.usefixtures("worker")
@pytest.mark.parametrize(("format", "read"), [("zip", unzipped), ("tar.gz", untarred), ("json", unpacked)])
async def test_export_contains_all_files_unchanged(
    alice: Actor, format: str, read: Callable[[bytes], dict[str, str]]
) -> None:
    workspace = await workspace_with(alice, FILES)
    artifact = await exported(alice, workspaceId=workspace, format=format)
    status, raw, headers = await download(alice, artifact)
    assert (status, len(raw), hashlib.sha256(raw).hexdigest()) == (200, artifact["size"], artifact["sha256"])
    assert read(raw) == FILES
    assert artifact["name"] == f"export.{format}"
    assert artifact["url"].startswith("/api/v1/jobs/")
    assert headers["Content-Disposition"] == f"attachment; filename*=UTF-8''export.{format}"
    assert headers["Accept-Ranges"] == "bytes"
    expires = datetime.fromisoformat(artifact["expiresAt"])
    assert timedelta(days=6) < expires - datetime.now(UTC) < timedelta(days=8)


@pytest.mark.usefixtures("worker")
async def test_each_workspace_of_a_project_is_its_own_folder(alice: Actor) -> None:
    project = await alice.make_project()
    first = await workspace_with(alice, {"a.txt": "1"}, project)
    second = await workspace_with(alice, {"a.txt": "2"}, project)  # of the same name
    await alice.patch(f"/workspaces/{first}", {"name": "../../etc"})
    third = await workspace_with(alice, {"a.txt": "3"}, project)
    artifact = await exported(alice, projectId=project, format="zip")
    _, raw, _ = await download(alice, artifact)
    assert unzipped(raw) == {"_.._etc/a.txt": "1", "Numbers/a.txt": "2", f"Numbers ({third})/a.txt": "3"}
    assert second != third


@pytest.mark.usefixtures("worker")
async def test_artifact_can_be_downloaded_in_ranges(alice: Actor) -> None:
    noise = "".join(random.choices(string.ascii_letters, k=600_000))
    artifact = await exported(alice, workspaceId=await workspace_with(alice, {"noise.txt": noise}), format="zip")
    _, raw, headers = await download(alice, artifact)
    size = len(raw)
    for requested, expected in (
        ("0-9", raw[:10]),
        ("300000-", raw[300_000:]),
        ("-5", raw[-5:]),
        (f"5-{size * 2}", raw[5:]),
        ("0-", raw),
        (f"-{size * 2}", raw),
    ):
        status, part, response_headers = await download(alice, artifact, Range=f"bytes={requested}")
        assert (status, part == expected) == (206, True)
        start = raw.index(expected)
        assert response_headers["Content-Range"] == f"bytes {start}-{start + len(part) - 1}/{size}"
    status, body, response_headers = await download(alice, artifact, Range=f"bytes={size}-")
    assert (status, json.loads(body)["code"]) == (416, "range_not_satisfiable")
    assert response_headers["Content-Range"] == f"bytes */{size}"
    for whole in ({"Range": "bytes=0-1,5-6"}, {"Range": "lines=1-2"}, {"Range": "bytes=0-9", "If-Range": '"other"'}):
        assert (await download(alice, artifact, **whole))[:2] == (200, raw)
    assert (await download(alice, artifact, **{"If-None-Match": headers["ETag"]}))[0] == 304


@pytest.mark.usefixtures("worker")
async def test_artifact_is_readable_only_with_access_to_its_job(alice: Actor, bob: Actor, carol: Actor) -> None:
    project = await alice.make_project(bob)
    artifact = await exported(alice, projectId=project, format="json")
    assert (await download(bob, artifact))[0] == 200
    assert (await download(carol, artifact))[0] == 404
    other = artifact | {"url": artifact["url"] + "x"}
    assert (await download(alice, other))[0] == 404


@pytest.mark.usefixtures("worker")
async def test_an_expired_artifact_is_gone(alice: Actor, stack: Stack) -> None:
    artifact = await exported(alice, workspaceId=await workspace_with(alice, {}), format="zip")
    job = artifact["url"].split("/")[4]
    with pymongo.MongoClient[dict[str, Any]](stack.mongo.url) as client:
        jobs = client.get_default_database()["jobs"]
        jobs.update_one({"_id": job}, {"$set": {"result.artifact.expiresAt": datetime.now(UTC) - timedelta(1)}})
    status, body, _ = await download(alice, artifact)
    assert (status, json.loads(body)["code"]) == (410, "gone")


async def test_many_documents_are_exported_in_constant_memory(
    processes: Processes, isolated_stores: dict[str, str], http: aiohttp.ClientSession, full: bool
) -> None:
    variables = environment_of(isolated_stores)
    server, worker = processes.server(**variables), processes.worker(**variables).ready()
    ada = await Actor(http, server.base, "Ada").register()
    small = await workspace_with(ada, {"a.txt": "a"})
    await exported(ada, workspaceId=small, format="zip")
    before = peak_of(worker.pid)
    workspace = await ada.make_workspace()
    noise = "".join(random.choices(string.ascii_letters, k=200_000))
    count = 1000 if full else 200
    for start in range(0, count, 10):
        posts = [
            ada.post(f"/workspaces/{workspace}/documents", {"path": f"{n}.txt", "content": f"{n}{noise}"})
            for n in range(start, start + 10)
        ]
        assert {answer.status for answer in await asyncio.gather(*posts)} == {201}
    artifact = await exported(ada, workspaceId=workspace, format="tar.gz")
    assert artifact["size"] > count * 100_000
    assert peak_of(worker.pid) - before < 24_000  # kilobytes; the documents have 40,000 or 200,000


def peak_of(pid: int) -> int:
    """Return the peak resident memory of a process, in kilobytes."""
    match = re.search(r"VmHWM:\s+(\d+)", Path(f"/proc/{pid}/status").read_text())
    assert match
    return int(match.group(1))
