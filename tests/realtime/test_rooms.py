"""Rooms: members of a workspace receive each other's events."""

import pytest

from tests.actors import Actor
from tests.sockets import ErrorReply


async def test_all_other_members_receive_a_change(alice: Actor, bob: Actor) -> None:
    workspace = await alice.make_workspace(None, bob)
    hers, his = await alice.connect(workspace), await bob.connect(workspace)
    await hers.assert_push("USER_JOIN", userId=bob.id, userName="Bob", workspaceId=workspace)
    change = {"insert": "ünï", "at": [1, 2.5, None]}
    ack = await hers.push("file:change", workspaceId=workspace, fileId="f1", path="src/a.py", change=change)
    event = await his.assert_push(
        "FILE_CHANGE", eventId=ack["eventId"], userId=alice.id, userName="Alice", path="src/a.py", change=change
    )
    assert event["fileId"] == "f1"
    assert event["timestamp"].endswith("Z")
    await hers.refute_push()


async def test_event_has_no_fields_that_the_client_did_not_send(alice: Actor, bob: Actor) -> None:
    workspace = await alice.make_workspace(None, bob)
    hers, his = await alice.connect(workspace), await bob.connect(workspace)
    await hers.push("file:change", workspaceId=workspace, change=None)
    event = await his.assert_push("FILE_CHANGE")
    assert event["change"] is None
    assert not {"fileId", "path", "position"} & event.keys()


async def test_client_cannot_set_other_fields_of_an_event(alice: Actor) -> None:
    workspace = await alice.make_workspace()
    hers = await alice.connect(workspace)
    with pytest.raises(ErrorReply, match="validation_failed"):
        await hers.push("file:change", workspaceId=workspace, change=1, userId="somebody", type="ROLE_CHANGED")


async def test_user_outside_the_room_does_not_receive_its_changes(alice: Actor, bob: Actor) -> None:
    workspace = await alice.make_workspace(None, bob)
    hers, his = await alice.connect(workspace), await bob.connect()
    await hers.push("file:change", workspaceId=workspace, change=1)
    await his.refute_push()
    with pytest.raises(ErrorReply, match="not_joined"):
        await his.push("file:change", workspaceId=workspace, change=2)
    with pytest.raises(ErrorReply, match="not_joined"):
        await his.push("cursor:update", workspaceId=workspace, position=2)


async def test_user_who_left_receives_no_more_events(alice: Actor, bob: Actor) -> None:
    workspace = await alice.make_workspace(None, bob)
    hers, his = await alice.connect(workspace), await bob.connect(workspace)
    assert await his.push("leave:workspace", workspaceId=workspace) == {}
    await hers.assert_push("USER_JOIN")
    await hers.assert_push("USER_LEAVE", userId=bob.id)
    await hers.push("file:change", workspaceId=workspace, change=1)
    await his.refute_push()
    with pytest.raises(ErrorReply, match="not_joined"):
        await his.push("file:change", workspaceId=workspace, change=2)
    assert await his.push("leave:workspace", workspaceId=workspace) == {}


async def test_viewer_receives_events_but_cannot_change_files(alice: Actor, bob: Actor) -> None:
    workspace = await alice.make_workspace(None, bob, role="VIEWER")
    hers, his = await alice.connect(workspace), await bob.connect(workspace)
    assert his.joined["role"] == "VIEWER"
    with pytest.raises(ErrorReply, match="forbidden"):
        await his.push("file:change", workspaceId=workspace, change=1)
    await hers.assert_push("USER_JOIN")
    await his.push("cursor:update", workspaceId=workspace, position={"line": 3})
    await hers.assert_push("CURSOR_UPDATE", userId=bob.id, position={"line": 3})


async def test_workspace_without_access_looks_like_a_missing_one(alice: Actor, bob: Actor) -> None:
    workspace = await alice.make_workspace()
    his = await bob.connect()
    for id in (workspace, "3b8b4a0e-0000-4000-8000-000000000000"):
        with pytest.raises(ErrorReply, match="not_found"):
            await his.push("join:workspace", workspaceId=id)
        with pytest.raises(ErrorReply, match="not_found"):
            await his.push("file:change", workspaceId=id, change=1)


async def test_joining_twice_changes_nothing(alice: Actor, bob: Actor) -> None:
    workspace = await alice.make_workspace(None, bob)
    hers, his = await alice.connect(workspace), await bob.connect(workspace)
    await hers.assert_push("USER_JOIN")
    again = await his.push("join:workspace", workspaceId=workspace)
    assert {user["userId"]: user["connections"] for user in again["users"]} == {alice.id: 1, bob.id: 1}
    ack = await hers.push("file:change", workspaceId=workspace, change=1)
    await his.assert_push("FILE_CHANGE", eventId=ack["eventId"])
    await his.refute_push()
    await hers.refute_push()


async def test_other_connections_of_the_same_user_receive_a_change(alice: Actor) -> None:
    workspace = await alice.make_workspace()
    desk, phone = await alice.connect(workspace), await alice.connect(workspace)
    ack = await desk.push("file:change", workspaceId=workspace, change=1)
    await phone.assert_push("FILE_CHANGE", eventId=ack["eventId"], userId=alice.id)
    await desk.refute_push()
