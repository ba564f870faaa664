"""The AsyncAPI document matches the product: real frames fit its schemas."""

import re
import subprocess
import sys
from typing import Any

import jsonschema
import orjson
import pytest

from server.app import MESSAGES, asyncapi_document
from server.errors import ERROR_CODES
from server.realtime import asyncapi
from server.realtime.table import merge
from tests.actors import Actor
from tests.processes import ROOT
from tests.sockets import ErrorReply, SocketClient, schema_name_of, validate_frame

DOCUMENT = asyncapi_document()
SHAPES: dict[str, Any] = DOCUMENT["components"]["messages"]


async def send_and_validate(socket: SocketClient, event: str, **data: Any) -> None:
    """Send a frame, and validate it, its ack and all pushes before the ack."""
    frame = {"event": event, "data": data, "id": "x"}
    validate_frame(frame, event.replace(":", "."))
    await socket.send(event, data, id="x")
    while (reply := await socket.next()).get("id") != "x":
        validate_frame(reply, schema_name_of(reply))
    validate_frame(reply, f"{event.replace(':', '.')}.ack")


EXPECTED = {
    "FILE_CHANGE",
    "CURSOR_UPDATE",
    "USER_LEAVE",
    "WORKSPACE_UPDATED",
    "PROJECT_UPDATED",
    "ROLE_CHANGED",
    "WORKSPACE_DELETED",
    "ACCESS_REVOKED",
    "error.push",
}


async def test_real_frames_fit_the_document(alice: Actor, bob: Actor) -> None:
    project = await alice.make_project(bob)
    workspace = await alice.make_workspace(project)
    hers, his = await alice.connect(), await bob.connect()
    validate_frame({"event": "welcome", "data": hers.welcome}, "welcome.push")
    since = (await hers.push("join:workspace", workspaceId=workspace))["lastEventId"]
    await send_and_validate(hers, "file:change", workspaceId=workspace, path="a", change={"b": None})
    await send_and_validate(his, "join:workspace", workspaceId=workspace, since=since)
    await send_and_validate(hers, "file:change", workspaceId=workspace, fileId="f", change=1)
    await send_and_validate(hers, "cursor:update", workspaceId=workspace, position=[1])
    await send_and_validate(hers, "authenticate", token=alice.access_token)
    await send_and_validate(hers, "ping")
    await send_and_validate(hers, "leave:workspace", workspaceId=workspace)
    await alice.patch(f"/workspaces/{workspace}", {"name": "Letters"})
    await alice.patch(f"/projects/{project}", {"name": "Engines"})
    await alice.post(f"/projects/{project}/transfer", {"userId": bob.id})
    await bob.delete(f"/workspaces/{workspace}")
    errors = 0
    await his.send("nonsense", {}, id=1)
    await his.send("join:workspace", {"workspaceId": 1})
    received = {"error.push"}
    while received < EXPECTED or errors < 2:
        frame = await his.next()
        validate_frame(frame, schema_name_of(frame))
        errors += frame["event"] == "error"
        received.add(schema_name_of(frame))
    assert received == EXPECTED


async def test_frame_that_violates_its_schema_is_rejected(alice: Actor) -> None:
    socket = await alice.connect()
    with pytest.raises(jsonschema.ValidationError):
        validate_frame({"event": "ping", "data": {"more": 1}}, "ping")
    with pytest.raises(ErrorReply, match="validation_failed"):
        await socket.push("ping", more=1)


def test_every_message_and_every_code_is_described() -> None:
    assert set(merge(MESSAGES)) <= {message["name"] for message in SHAPES.values()}
    codes = SHAPES["error.push"]["payload"]["properties"]["data"]["properties"]["code"]["enum"]
    assert {*codes} == {*ERROR_CODES}


def test_references_resolve() -> None:
    def references(value: Any) -> list[str]:
        if isinstance(value, dict):
            own = [value["$ref"]] if isinstance(value.get("$ref"), str) else []
            return own + [reference for part in value.values() for reference in references(part)]
        return [reference for part in value for reference in references(part)] if isinstance(value, list) else []

    all_references = references(DOCUMENT)
    assert all_references
    for reference in all_references:
        target: Any = DOCUMENT
        for part in reference.removeprefix("#/").split("/"):
            target = target[part]


def test_document_has_the_structure_of_asyncapi_3() -> None:
    assert DOCUMENT["asyncapi"] == "3.0.0"
    assert {"title", "version"} <= DOCUMENT["info"].keys()
    channel_messages = {f"#/channels/socket/messages/{name}" for name in DOCUMENT["channels"]["socket"]["messages"]}
    assert channel_messages == {f"#/channels/socket/messages/{name}" for name in SHAPES}
    for name, shape in SHAPES.items():
        assert re.fullmatch(r"[\w.-]+", name)
        jsonschema.Draft202012Validator.check_schema(shape["payload"])
    for operation in DOCUMENT["operations"].values():
        assert operation["action"] in ("send", "receive")
        assert operation["channel"] == {"$ref": "#/channels/socket"}
        messages = [*operation["messages"], *operation.get("reply", {"messages": []})["messages"]]
        references = {message["$ref"] for message in messages}
        assert references <= channel_messages, "an operation refers to messages of its channel"


async def test_document_and_page_are_public(alice: Actor) -> None:
    alice.access_token = ""
    response = await alice.call("GET", f"/api/..{asyncapi.DOCUMENT_PATH}")
    assert (response.status, response.body) == (200, orjson.loads(orjson.dumps(DOCUMENT)))
    page = await alice.call("GET", f"/api/..{asyncapi.PAGE_PATH}")
    assert page.status == 200
    assert page.headers["Content-Type"] == "text/html; charset=utf-8"
    for word in ("file:change", "CURSOR_UPDATE", "4408", "lastEventId"):
        assert word in page.body
    assert "http" not in page.body, "the page loads nothing from other hosts"


def test_command_prints_the_document() -> None:
    completed = subprocess.run([sys.executable, "run.py", "asyncapi"], cwd=ROOT, capture_output=True, check=True)
    assert orjson.loads(completed.stdout) == orjson.loads(orjson.dumps(DOCUMENT))
