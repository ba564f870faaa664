"""The product is prepared for Redis Cluster: all keys of one script are in one slot."""

import asyncio
from typing import Any

from redis.asyncio import Redis
from redis.crc import key_slot

from server.devstack.stack import Stack
from tests.actors import Actor
from tests.conftest import MakeActor, MakeServer, environment_of
from tests.processes import Processes

CODE = {"type": "CODE_EXECUTION", "payload": {"language": "python", "code": "print(1)"}}


class RedisMonitor:
    """A record of the scripts that Redis runs while it is open, from MONITOR."""

    def __init__(self, url: str) -> None:
        self._redis = Redis.from_url(url)
        self.scripts: list[list[str]] = []  # the keys of each call

    async def __aenter__(self) -> "RedisMonitor":
        self._monitor = self._redis.monitor()
        await self._monitor.__aenter__()
        self._listening = asyncio.ensure_future(self._listen())
        return self

    async def __aexit__(self, *_: Any) -> None:
        self._listening.cancel()
        await asyncio.wait({self._listening})
        await self._monitor.__aexit__(None, None, None)
        await self._redis.aclose()

    async def _listen(self) -> None:
        async for call in self._monitor.listen():
            # The format is: EVALSHA sha count key…. EVAL is ignored: its text has spaces, and no EVAL has several keys.
            words = call["command"].split(" ")
            if call["client_type"] != "lua" and words[0].upper() == "EVALSHA":
                self.scripts.append(words[3 : 3 + int(words[2])])


def test_the_slot_function_follows_the_specification() -> None:
    assert key_slot(b"123456789") == 0x31C3
    assert key_slot(b"{user1000}.following") == key_slot(b"{user1000}.followers")
    assert key_slot(b"foo{}{bar}") != key_slot(b"bar")
    assert key_slot(b"one") != key_slot(b"other")


async def test_the_keys_of_every_script_of_a_real_session_share_a_slot(
    stack: Stack, isolated_stores: dict[str, str], make_server: MakeServer, make_actor: MakeActor, processes: Processes
) -> None:
    async with RedisMonitor(isolated_stores["redis_url"]) as monitor:
        processes.worker(**environment_of(isolated_stores), JOB_FAULT_RATE="0").ready()
        base = await make_server(**isolated_stores)
        alice, bob = await make_actor("Alice", base), await make_actor("Bob", base)
        workspace = await alice.make_workspace(None, bob)
        await collaborate(alice, bob, workspace)
        submitted = await alice.post("/jobs", CODE, headers={"Idempotency-Key": "once"})
        assert submitted.status == 201, submitted
        await alice.finished_job(submitted["job"]["id"])
        assert (await alice.post("/auth/logout", {})).status == 204
    multi_key_calls = [keys for keys in monitor.scripts if len(keys) > 1]
    tags = {keys[0].split(":")[0] for keys in multi_key_calls}
    assert {"ws", "{auth}", "saq"} <= tags, tags
    assert [keys for keys in multi_key_calls if len({key_slot(key.encode()) for key in keys}) > 1] == []


async def collaborate(alice: Actor, bob: Actor, workspace: str) -> None:
    alice_socket, bob_socket = await alice.connect(workspace), await bob.connect(workspace)
    await alice_socket.push("file:change", workspaceId=workspace, path="main.py", change={"insert": "x"})
    await bob_socket.push("leave:workspace", workspaceId=workspace)
    assert (await alice.get(f"/workspaces/{workspace}/events")).status == 200
    assert (await alice.get(f"/workspaces/{workspace}/users")).status == 200
    assert (await alice.post("/auth/ws-ticket")).status == 201
