"""The owner hears of a job wherever connected; its workspace hears how it goes."""

import asyncio

import pytest
from redis.asyncio import Redis

from server.jobs.bell import BELL
from server.settings import Settings
from tests.actors import Actor
from tests.conftest import MakeActor, MakeServer
from tests.jobs.asking import ask, program
from tests.patience import PATIENCE_SECONDS
from tests.sockets import Socket

pytestmark = pytest.mark.usefixtures("worker")


async def heard_until(socket: Socket, job: str, status: str) -> tuple[list[str], str]:
    """Statuses, each once in a row, and the output."""
    statuses: list[str] = []
    text = ""
    while not statuses or statuses[-1] != status:
        frame = await socket.next()
        if frame["event"] == "job:output":
            data = frame["data"]
            assert (data["jobId"], data["offset"], data["stream"]) == (job, len(text), "stdout")
            text += data["text"]
        elif frame["event"] == "job:updated":
            told = frame["data"]["job"]
            assert told["id"] == job
            statuses += [told["status"]] if statuses[-1:] != [told["status"]] else []
    return statuses, text


async def test_the_owner_hears_every_move_and_the_output_on_every_connection(
    make_server: MakeServer, make_actor: MakeActor
) -> None:
    first, second = await make_server(), await make_server()
    alice = await make_actor("Alice", first)
    sockets = [await alice.connect(), await alice.at(second).connect()]
    code = "import time\nfor n in range(3):\n    print(n, flush=True)\n    time.sleep(0.2)"
    job = (await ask(alice, program(code)))["id"]
    for socket in sockets:
        assert await heard_until(socket, job, "completed") == (["pending", "processing", "completed"], "0\n1\n2\n")


async def test_pending_is_told_before_a_worker_hears_of_the_job(alice: Actor, settings: Settings) -> None:
    job = (await ask(alice, runAt="2100-01-01T00:00:00Z"))["id"]
    await alice.post(f"/jobs/{job}/cancel")
    async with Redis.from_url(settings.redis_url) as redis, redis.pubsub() as pubsub:
        await pubsub.psubscribe("*")
        await pubsub.get_message(timeout=PATIENCE_SECONDS)
        for begin in (ask(alice), alice.post(f"/jobs/{job}/retry")):
            asking = asyncio.ensure_future(begin)
            told = False
            while (
                heard := await pubsub.get_message(ignore_subscribe_messages=True, timeout=PATIENCE_SECONDS)
            ) is not None:
                told = told or (alice.id in heard["channel"].decode() and b"pending" in heard["data"])
                if heard["channel"].decode() == BELL:
                    break
            assert told
            await asking


async def test_the_owner_hears_how_far_a_job_is(alice: Actor) -> None:
    workspace = await alice.make_workspace()
    for number in range(4):
        await alice.post(f"/workspaces/{workspace}/documents", {"path": f"{number}.txt", "content": "x" * 100})
    socket = await alice.connect()
    for asked in (
        {"type": "EXPORT", "payload": {"workspaceId": workspace, "format": "json"}},
        {"type": "FILE_PROCESSING", "payload": {"workspaceId": workspace}},
    ):
        await ask(alice, asked)
        heard = [await socket.assert_push("job:updated")]
        while heard[-1]["job"]["status"] in ("pending", "processing"):
            heard.append(await socket.assert_push("job:updated"))
        told = [each["job"]["progress"] for each in heard if each["job"]["status"] == "processing"]
        assert told[:2] == [0, 25]  # then at most every half second
        assert heard[-1]["job"]["progress"] == 100


async def test_others_hear_nothing_of_a_job_without_a_workspace(alice: Actor, bob: Actor) -> None:
    hers, his = await alice.connect(), await bob.connect()
    job = (await ask(alice))["id"]
    await heard_until(hers, job, "completed")
    await his.refute_push()


async def test_those_in_the_workspace_hear_how_it_goes(alice: Actor, bob: Actor) -> None:
    workspace = await alice.make_workspace(None, bob)
    his = await bob.connect(workspace)
    job = (await ask(alice, workspaceId=workspace, runAt="2100-01-01T00:00:00Z"))["id"]
    await his.assert_push("JOB_UPDATED", jobId=job, status="pending", userId=alice.id, userName="Alice")
    await alice.post(f"/jobs/{job}/cancel")
    await his.assert_push("JOB_UPDATED", jobId=job, status="cancelled", jobType="CODE_EXECUTION")


async def test_a_job_too_large_for_a_frame_is_told_without_its_payload(alice: Actor) -> None:
    socket = await alice.connect()
    job = (await ask(alice, program("#" * 100_000), runAt="2100-01-01T00:00:00Z"))["id"]
    told = (await socket.assert_push("job:updated"))["job"]
    assert (told["id"], told["status"], "payload" in told) == (job, "pending", False)
