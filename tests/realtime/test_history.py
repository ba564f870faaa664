"""Resuming: a client that joins with its last event id gets the missed events, or a gap if they are gone."""

import time
from typing import Any
from uuid import uuid4

import pytest

from server.devstack.stack import Stack
from server.realtime.history import History, event_id_key, stream_keys
from server.resources import redis_client
from tests.actors import Actor
from tests.conftest import MakeActor, MakeServer
from tests.sockets import ErrorReply, SocketClient


async def change(socket: SocketClient, workspace: str, *changes: Any) -> list[str]:
    return [(await socket.push("file:change", workspaceId=workspace, change=value))["eventId"] for value in changes]


async def join(socket: SocketClient, workspace: str, since: str | None) -> dict[str, Any]:
    return await socket.push("join:workspace", workspaceId=workspace, since=since)


async def test_first_join_returns_an_event_id_to_resume_from(alice: Actor) -> None:
    workspace = await alice.make_workspace()
    opening = (await alice.connect(workspace)).joined["lastEventId"]
    joined = await join(await alice.connect(), workspace, opening)
    assert (joined["events"], joined["gap"], joined["more"]) == ([], False, False)
    assert joined["lastEventId"] == opening


async def test_missed_events_come_in_order_before_new_ones(alice: Actor, bob: Actor) -> None:
    workspace = await alice.make_workspace(None, bob)
    hers, his = await alice.connect(workspace), await bob.connect(workspace)
    since = his.joined["lastEventId"]
    await his.push("file:change", workspaceId=workspace, change="his own")
    his.abort()
    ids = await change(hers, workspace, *range(5))
    back = await bob.connect()
    joined = await join(back, workspace, since)
    assert [event["change"] for event in joined["events"]] == ["his own", 0, 1, 2, 3, 4]
    assert [event["eventId"] for event in joined["events"][1:]] == ids
    assert joined["lastEventId"] == ids[-1]
    assert {event["type"] for event in joined["events"]} == {"FILE_CHANGE"}
    (new,) = await change(hers, workspace, "new")
    await back.assert_push("FILE_CHANGE", eventId=new)
    await back.refute_push()


async def test_event_ids_grow(alice: Actor) -> None:
    workspace = await alice.make_workspace()
    ids = await change(await alice.connect(workspace), workspace, *range(30))
    assert ids == sorted(ids, key=event_id_key)
    assert len({*ids}) == 30


async def test_event_that_is_not_in_the_history_is_a_gap(make_server: MakeServer, make_actor: MakeActor) -> None:
    alice = await make_actor("Alice", await make_server(history_events=10))
    workspace = await alice.make_workspace()
    hers = await alice.connect(workspace)
    opening = hers.joined["lastEventId"]
    ids = await change(hers, workspace, *range(10))
    assert (await join(await alice.connect(), workspace, opening))["gap"] is True
    kept = await join(await alice.connect(), workspace, ids[0])
    assert (kept["gap"], [event["change"] for event in kept["events"]]) == (False, [*range(1, 10)])
    past = await join(await alice.connect(), workspace, "1-0")
    assert (past["gap"], past["events"], past["lastEventId"]) == (True, [], ids[-1])
    future = await join(await alice.connect(), workspace, "99999999999999-0")
    assert (future["gap"], future["events"]) == (True, [])


async def test_history_is_bounded_in_bytes(make_server: MakeServer, make_actor: MakeActor) -> None:
    alice = await make_actor("Alice", await make_server(history_bytes=1 << 20))
    workspace = await alice.make_workspace()
    hers = await alice.connect(workspace)
    ids = await change(hers, workspace, *("x" * 200_000 for _ in range(8)))
    events = await alice.get(f"/workspaces/{workspace}/events?limit=100")
    assert [event["eventId"] for event in events["items"]] == ids[-5:]


async def test_events_older_than_a_day_are_deleted(stack: Stack) -> None:
    redis, workspace = redis_client(stack.valkey.url), uuid4()
    history = History(redis, max_events=1000, max_bytes=1 << 20)
    now = int(time.time())
    hours = {age: f"{(now - age * 3600) * 1000}-0" for age in (30, 25, 23)}
    for end, id in enumerate(hours.values(), 1):
        entry = {"origin": "", "end": 10 * end, "data": f'"n":{end:04}}}'}
        await redis.xadd(stream_keys(workspace)[0], entry, id=id)
    await redis.set(stream_keys(workspace)[1], 30)
    new = await history.append(workspace, channel="nobody", origin="", body=b'{"n":4}')
    read = await history.read(workspace, after=None, limit=100)
    assert [entry.id for entry in read.events] == [hours[23], new]
    assert (await history.read(workspace, after=hours[25], limit=100)).gap is True
    assert (await history.read(workspace, after=hours[23], limit=100)).gap is False
    await history.close()
    await redis.aclose()


async def test_join_without_since_has_no_replay_and_malformed_since_is_rejected(alice: Actor) -> None:
    workspace = await alice.make_workspace()
    await change(await alice.connect(workspace), workspace, 1, 2)
    socket = await alice.connect()
    for since in ("", "nonsense", "1", "-1-1", "1-1-1", "9" * 30 + "-1"):
        with pytest.raises(ErrorReply, match="validation_failed"):
            await join(socket, workspace, since)
    joined = await join(socket, workspace, None)
    assert (joined["events"], joined["gap"]) == ([], False)


async def test_replay_over_one_mebibyte_comes_in_parts(alice: Actor, bob: Actor) -> None:
    workspace = await alice.make_workspace(None, bob)
    hers = await alice.connect(workspace)
    since = hers.joined["lastEventId"]
    sent = [[number, "x" * 240_000] for number in range(11)]
    await change(hers, workspace, *sent)
    his, parts, received = await bob.connect(), 0, []
    while True:
        joined = await join(his, workspace, since)
        received += [event["change"] for event in joined["events"]]
        parts += 1
        if not joined["more"]:
            break
        since = joined["events"][-1]["eventId"]
        assert bob.id not in {user["userId"] for user in joined["users"]}
        with pytest.raises(ErrorReply, match="not_joined"):
            await his.push("cursor:update", workspaceId=workspace, position=1)
    assert (received, parts) == (sent, 3)
    await hers.assert_push("USER_JOIN", userId=bob.id)
    await change(hers, workspace, "live")
    assert (await his.assert_push("FILE_CHANGE"))["change"] == "live"


async def test_member_can_request_missed_events_again(alice: Actor, bob: Actor) -> None:
    workspace = await alice.make_workspace(None, bob)
    hers, his = await alice.connect(workspace), await bob.connect(workspace)
    await change(hers, workspace, 1, 2)
    for number in (1, 2):
        assert (await his.assert_push("FILE_CHANGE"))["change"] == number
    again = await join(his, workspace, his.joined["lastEventId"])
    assert [event["change"] for event in again["events"]] == [1, 2]
    await change(hers, workspace, 3)
    assert (await his.assert_push("FILE_CHANGE"))["change"] == 3
    await his.refute_push()
    await hers.assert_push("USER_JOIN")
    await hers.refute_push()


async def test_history_is_paginated_over_rest(alice: Actor, bob: Actor) -> None:
    workspace = await alice.make_workspace(None, bob)
    path = f"/workspaces/{workspace}/events"
    empty = await alice.get(path)
    assert empty.body == {"items": [], "nextCursor": None, "gap": False}
    ids = await change(await alice.connect(workspace), workspace, *range(7))
    first = await bob.get(f"{path}?limit=3")
    assert [event["change"] for event in first["items"]] == [0, 1, 2]
    second = await bob.get(f"{path}?limit=3&cursor={first['nextCursor']}")
    assert [event["change"] for event in second["items"]] == [3, 4, 5]
    last = await bob.get(f"{path}?limit=3&after={second['nextCursor']}")
    assert ([event["change"] for event in last["items"]], last["nextCursor"]) == ([6], None)
    assert (await bob.get(f"{path}?after={ids[-1]}"))["items"] == []
    assert (await bob.get(f"{path}?after=1-1")).body == {"items": [], "nextCursor": None, "gap": True}
    for query in ("after=nonsense", "cursor=nonsense", "limit=0", "limit=101"):
        assert (await bob.get(f"{path}?{query}")).status == 422


async def test_user_without_access_reads_neither_history_nor_presence(alice: Actor, bob: Actor) -> None:
    workspace = await alice.make_workspace()
    for path in ("events", "users"):
        assert (await bob.get(f"/workspaces/{workspace}/{path}")).status == 404
