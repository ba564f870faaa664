"""Live events: the owner of a job receives them on every connection, its workspace receives the status."""

import asyncio

import pytest
from redis.asyncio import Redis

from server.jobs.notifier import NOTIFICATION_CHANNEL
from server.settings import Settings
from tests.actors import Actor
from tests.conftest import MakeActor, MakeServer
from tests.jobs.requests import program_job, submit_job
from tests.sockets import SocketClient
from tests.timeouts import WAIT_TIMEOUT_SECONDS

pytestmark = pytest.mark.usefixtures("worker")


async def receive_until_status(socket: SocketClient, job: str, status: str) -> tuple[list[str], str]:
    """Receive events until a status; return the distinct statuses in order, and the output."""
    statuses: list[str] = []
    text = ""
    while not statuses or statuses[-1] != status:
        frame = await socket.next()
        if frame["event"] == "job:output":
            data = frame["data"]
            assert (data["jobId"], data["offset"], data["stream"]) == (job, len(text), "stdout")
            text += data["text"]
        elif frame["event"] == "job:updated":
            announced = frame["data"]["job"]
            assert announced["id"] == job
            statuses += [announced["status"]] if statuses[-1:] != [announced["status"]] else []
    return statuses, text


async def test_owner_receives_every_status_and_the_output_on_every_connection(
    make_server: MakeServer, make_actor: MakeActor
) -> None:
    first, second = await make_server(), await make_server()
    alice = await make_actor("Alice", first)
    sockets = [await alice.connect(), await alice.at(second).connect()]
    code = "import time\nfor n in range(3):\n    print(n, flush=True)\n    time.sleep(0.2)"
    job = (await submit_job(alice, program_job(code)))["id"]
    for socket in sockets:
        assert await receive_until_status(socket, job, "completed") == (
            ["pending", "processing", "completed"],
            "0\n1\n2\n",
        )


async def test_pending_is_announced_before_workers_are_notified(alice: Actor, settings: Settings) -> None:
    job = (await submit_job(alice, runAt="2100-01-01T00:00:00Z"))["id"]
    await alice.post(f"/jobs/{job}/cancel")
    async with Redis.from_url(settings.redis_url) as redis, redis.pubsub() as pubsub:
        await pubsub.psubscribe("*")
        await pubsub.get_message(timeout=WAIT_TIMEOUT_SECONDS)
        for request in (submit_job(alice), alice.post(f"/jobs/{job}/retry")):
            sending = asyncio.ensure_future(request)
            announced = False
            while (
                message := await pubsub.get_message(ignore_subscribe_messages=True, timeout=WAIT_TIMEOUT_SECONDS)
            ) is not None:
                announced = announced or (alice.id in message["channel"].decode() and b"pending" in message["data"])
                if message["channel"].decode() == NOTIFICATION_CHANNEL:
                    break
            assert announced
            await sending


async def test_owner_receives_progress(alice: Actor) -> None:
    workspace = await alice.make_workspace()
    for number in range(4):
        await alice.post(f"/workspaces/{workspace}/documents", {"path": f"{number}.txt", "content": "x" * 100})
    socket = await alice.connect()
    for request in (
        {"type": "EXPORT", "payload": {"workspaceId": workspace, "format": "json"}},
        {"type": "FILE_PROCESSING", "payload": {"workspaceId": workspace}},
    ):
        await submit_job(alice, request)
        events = [await socket.assert_push("job:updated")]
        while events[-1]["job"]["status"] in ("pending", "processing"):
            events.append(await socket.assert_push("job:updated"))
        progress = [event["job"]["progress"] for event in events if event["job"]["status"] == "processing"]
        assert progress[:2] == [0, 25]  # then at most twice a second
        assert events[-1]["job"]["progress"] == 100


async def test_other_users_receive_nothing_of_a_job_without_a_workspace(alice: Actor, bob: Actor) -> None:
    hers, his = await alice.connect(), await bob.connect()
    job = (await submit_job(alice))["id"]
    await receive_until_status(hers, job, "completed")
    await his.refute_push()


async def test_workspace_members_receive_status_changes(alice: Actor, bob: Actor) -> None:
    workspace = await alice.make_workspace(None, bob)
    his = await bob.connect(workspace)
    job = (await submit_job(alice, workspaceId=workspace, runAt="2100-01-01T00:00:00Z"))["id"]
    await his.assert_push("JOB_UPDATED", jobId=job, status="pending", userId=alice.id, userName="Alice")
    await alice.post(f"/jobs/{job}/cancel")
    await his.assert_push("JOB_UPDATED", jobId=job, status="cancelled", jobType="CODE_EXECUTION")


async def test_job_too_large_for_a_frame_is_announced_without_its_payload(alice: Actor) -> None:
    socket = await alice.connect()
    job = (await submit_job(alice, program_job("#" * 100_000), runAt="2100-01-01T00:00:00Z"))["id"]
    announced = (await socket.assert_push("job:updated"))["job"]
    assert (announced["id"], announced["status"], "payload" in announced) == (job, "pending", False)
