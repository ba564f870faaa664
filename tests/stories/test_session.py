"""The main use case, end to end: two users, two server processes, one edit, one program run."""

import asyncio
from typing import Any

import aiohttp
import pytest

from tests.actors import Actor
from tests.devstack.pids import all_exited, children_of
from tests.processes import Processes
from tests.sockets import ErrorReply
from tests.timeouts import WAIT_TIMEOUT_SECONDS

PROGRAM = 'import sys\nprint("squares of", sys.stdin.read())\nprint([n * n for n in range(5)])\n'


async def test_two_users_on_two_servers_share_a_workspace_and_run_a_program(
    processes: Processes, http: aiohttp.ClientSession
) -> None:
    first, second, worker = processes.server(), processes.server(), processes.worker(JOB_FAULT_RATE="0")
    ada = await Actor(http, first.base, "Ada").register()
    bob = await Actor(http, second.base, "Bob").register()
    assert (await bob.get("/auth/profile"))["email"] == bob.email

    project = await ada.make_project(bob, name="Analytical Engine")
    workspace = await ada.make_workspace(project)
    seen = await bob.get(f"/projects/{project}")
    assert (seen["role"], seen["counts"]) == ("COLLABORATOR", {"workspaces": 1, "collaborators": 2})
    assert (await bob.get(f"/workspaces/{workspace}"))["name"] == "Numbers"

    adas, bobs = await ada.connect(workspace), await bob.connect(workspace)
    assert {person["userName"] for person in bobs.joined["users"]} == {"Ada", "Bob"}
    await adas.assert_push("USER_JOIN", userId=bob.id)

    change = {"insert": "print('hello')", "at": [0, 1.5, None]}
    ack = await bobs.push("file:change", workspaceId=workspace, path="main.py", change=change)
    await adas.assert_push("FILE_CHANGE", eventId=ack["eventId"], change=change, path="main.py", userId=bob.id)
    await bobs.refute_push()  # no echo
    await adas.refute_push()  # never twice

    worker.ready()
    payload = {"language": "python", "code": PROGRAM, "stdin": "small numbers"}
    submitted = await bob.post("/jobs", {"type": "CODE_EXECUTION", "payload": payload, "workspaceId": workspace})
    assert (submitted.status, submitted["duplicate"], submitted["job"]["status"]) == (201, False, "pending")
    job = await ada.at(second.base).finished_job(submitted["job"]["id"])  # a member can read it, on any server
    assert job["status"] == "completed"
    assert job["result"]["stdout"] == "squares of small numbers\n[0, 1, 4, 9, 16]\n"
    assert (job["result"]["exitCode"], job["projectId"], job["attempts"]) == (0, project, 1)

    for status in ("pending", "processing", "completed"):
        await adas.assert_push("JOB_UPDATED", jobId=job["id"], status=status, jobType="CODE_EXECUTION", userId=bob.id)

    await bobs.close()
    await adas.assert_push("USER_LEAVE", userId=bob.id)
    children = [pid for process in (first, second, worker) for pid in children_of(process.pid).values()]
    endings = [asyncio.to_thread(process.terminate) for process in (first, second, worker)]
    *codes, closed_with = await asyncio.gather(*endings, adas.closed())
    assert (codes, closed_with) == ([0, 0, 0], 1012)
    assert all_exited(children, seconds=WAIT_TIMEOUT_SECONDS)


async def test_user_without_access_gets_not_found_everywhere(processes: Processes, http: aiohttp.ClientSession) -> None:
    server = processes.server()
    ada = await Actor(http, server.base, "Ada").register()
    eve = await Actor(http, server.base, "Eve").register()
    project = await ada.make_project()
    workspace = await ada.make_workspace(project)
    socket = await eve.connect()
    for response in (
        await eve.get(f"/projects/{project}"),
        await eve.get(f"/workspaces/{workspace}"),
        await eve.post("/workspaces", {"projectId": project, "name": "Mine"}),
        await eve.post("/jobs", {"type": "CODE_EXECUTION", "payload": job_payload(), "workspaceId": workspace}),
    ):
        assert (response.status, response.code) == (404, "not_found")
    with pytest.raises(ErrorReply, match="not_found"):
        await socket.push("join:workspace", workspaceId=workspace)


def job_payload() -> dict[str, Any]:
    return {"language": "python", "code": "print()"}
