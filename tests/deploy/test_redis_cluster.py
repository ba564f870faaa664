"""Prepared for Redis Cluster: the keys of one script are on one node."""

import asyncio
from typing import Any

from redis.asyncio import Redis
from redis.crc import key_slot

from server.devstack.stack import Stack
from tests.actors import Actor
from tests.conftest import MakeActor, MakeServer, environment
from tests.processes import Processes

CODE = {"type": "CODE_EXECUTION", "payload": {"language": "python", "code": "print(1)"}}


class Watched:
    """What Redis is asked while this is open, as MONITOR tells it."""

    def __init__(self, url: str) -> None:
        self._redis = Redis.from_url(url)
        self.scripts: list[list[str]] = []  # of each call the keys

    async def __aenter__(self) -> "Watched":
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
        async for asked in self._monitor.listen():
            # EVALSHA sha count key…; of EVAL, whose text has spaces, none takes several keys.
            words = asked["command"].split(" ")
            if asked["client_type"] != "lua" and words[0].upper() == "EVALSHA":
                self.scripts.append(words[3 : 3 + int(words[2])])


def test_the_slot_function_is_the_specifications() -> None:
    assert key_slot(b"123456789") == 0x31C3
    assert key_slot(b"{user1000}.following") == key_slot(b"{user1000}.followers")
    assert key_slot(b"foo{}{bar}") != key_slot(b"bar")
    assert key_slot(b"one") != key_slot(b"other")


async def test_the_keys_of_every_script_of_a_real_session_share_a_slot(
    stack: Stack, quiet: dict[str, str], make_server: MakeServer, make_actor: MakeActor, processes: Processes
) -> None:
    async with Watched(quiet["redis_url"]) as watched:
        processes.worker(**environment(quiet), JOB_FAULT_RATE="0").ready()
        base = await make_server(**quiet)
        alice, bob = await make_actor("Alice", base), await make_actor("Bob", base)
        workspace = await alice.make_workspace(None, bob)
        await work_together(alice, bob, workspace)
        asked = await alice.post("/jobs", CODE, headers={"Idempotency-Key": "once"})
        assert asked.status == 201, asked
        await alice.finished_job(asked["job"]["id"])
        assert (await alice.post("/auth/logout", {})).status == 204
    several = [keys for keys in watched.scripts if len(keys) > 1]
    tags = {keys[0].split(":")[0] for keys in several}
    assert {"ws", "{auth}", "saq"} <= tags, tags
    assert [keys for keys in several if len({key_slot(key.encode()) for key in keys}) > 1] == []


async def work_together(alice: Actor, bob: Actor, workspace: str) -> None:
    ones, others = await alice.connect(workspace), await bob.connect(workspace)
    await ones.push("file:change", workspaceId=workspace, path="main.py", change={"insert": "x"})
    await others.push("leave:workspace", workspaceId=workspace)
    assert (await alice.get(f"/workspaces/{workspace}/events")).status == 200
    assert (await alice.get(f"/workspaces/{workspace}/users")).status == 200
    assert (await alice.post("/auth/ws-ticket")).status == 201
