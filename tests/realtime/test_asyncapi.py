"""The AsyncAPI document says what is really said: real frames fit its shapes."""

import re
import subprocess
import sys
from typing import Any

import jsonschema
import orjson
import pytest

from server.app import MESSAGES, asyncapi_document
from server.errors import CODES
from server.realtime import asyncapi
from server.realtime.table import merge
from tests.actors import Actor
from tests.processes import ROOT
from tests.sockets import Refused, Socket, fits, shape_of

DOCUMENT = asyncapi_document()
SHAPES: dict[str, Any] = DOCUMENT["components"]["messages"]


async def asked(socket: Socket, event: str, **data: Any) -> None:
    """Send a frame that fits, and get the ack that fits."""
    frame = {"event": event, "data": data, "id": "x"}
    fits(frame, event.replace(":", "."))
    await socket.send(event, data, id="x")
    while (answer := await socket.next()).get("id") != "x":
        fits(answer, shape_of(answer))
    fits(answer, f"{event.replace(':', '.')}.ack")


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
    fits({"event": "welcome", "data": hers.welcome}, "welcome.push")
    since = (await hers.push("join:workspace", workspaceId=workspace))["lastEventId"]
    await asked(hers, "file:change", workspaceId=workspace, path="a", change={"b": None})
    await asked(his, "join:workspace", workspaceId=workspace, since=since)
    await asked(hers, "file:change", workspaceId=workspace, fileId="f", change=1)
    await asked(hers, "cursor:update", workspaceId=workspace, position=[1])
    await asked(hers, "authenticate", token=alice.access_token)
    await asked(hers, "ping")
    await asked(hers, "leave:workspace", workspaceId=workspace)
    await alice.patch(f"/workspaces/{workspace}", {"name": "Letters"})
    await alice.patch(f"/projects/{project}", {"name": "Engines"})
    await alice.post(f"/projects/{project}/transfer", {"userId": bob.id})
    await bob.delete(f"/workspaces/{workspace}")
    errors = 0
    await his.send("nonsense", {}, id=1)
    await his.send("join:workspace", {"workspaceId": 1})
    heard = {"error.push"}
    while heard < EXPECTED or errors < 2:
        frame = await his.next()
        fits(frame, shape_of(frame))
        errors += frame["event"] == "error"
        heard.add(shape_of(frame))
    assert heard == EXPECTED


async def test_a_frame_that_does_not_fit_is_refused_and_one_that_fits_is_not(alice: Actor) -> None:
    socket = await alice.connect()
    with pytest.raises(jsonschema.ValidationError):
        fits({"event": "ping", "data": {"more": 1}}, "ping")
    with pytest.raises(Refused, match="validation_failed"):
        await socket.push("ping", more=1)


def test_every_message_and_every_code_is_described() -> None:
    assert set(merge(MESSAGES)) <= {each["name"] for each in SHAPES.values()}
    codes = SHAPES["error.push"]["payload"]["properties"]["data"]["properties"]["code"]["enum"]
    assert {*codes} == {*CODES}


def test_references_lead_somewhere() -> None:
    def references(value: Any) -> list[str]:
        if isinstance(value, dict):
            own = [value["$ref"]] if isinstance(value.get("$ref"), str) else []
            return own + [each for part in value.values() for each in references(part)]
        return [each for part in value for each in references(part)] if isinstance(value, list) else []

    found = references(DOCUMENT)
    assert found
    for reference in found:
        target: Any = DOCUMENT
        for part in reference.removeprefix("#/").split("/"):
            target = target[part]


def test_the_document_has_the_structure_of_asyncapi_3() -> None:
    assert DOCUMENT["asyncapi"] == "3.0.0"
    assert {"title", "version"} <= DOCUMENT["info"].keys()
    here = {f"#/channels/socket/messages/{name}" for name in DOCUMENT["channels"]["socket"]["messages"]}
    assert here == {f"#/channels/socket/messages/{name}" for name in SHAPES}
    for name, shape in SHAPES.items():
        assert re.fullmatch(r"[\w.-]+", name)
        jsonschema.Draft202012Validator.check_schema(shape["payload"])
    for operation in DOCUMENT["operations"].values():
        assert operation["action"] in ("send", "receive")
        assert operation["channel"] == {"$ref": "#/channels/socket"}
        messages = [*operation["messages"], *operation.get("reply", {"messages": []})["messages"]]
        assert {each["$ref"] for each in messages} <= here, "an operation names messages of its channel"


async def test_document_and_page_are_served_to_all(alice: Actor) -> None:
    alice.access_token = ""
    served = await alice.call("GET", f"/api/..{asyncapi.DOCUMENT}")
    assert (served.status, served.body) == (200, orjson.loads(orjson.dumps(DOCUMENT)))
    page = await alice.call("GET", f"/api/..{asyncapi.PAGE}")
    assert page.status == 200
    assert page.headers["Content-Type"] == "text/html; charset=utf-8"
    for word in ("file:change", "CURSOR_UPDATE", "4408", "lastEventId"):
        assert word in page.body
    assert "http" not in page.body, "nothing comes from elsewhere"


def test_the_command_prints_the_document() -> None:
    done = subprocess.run([sys.executable, "run.py", "asyncapi"], cwd=ROOT, capture_output=True, check=True)
    assert orjson.loads(done.stdout) == orjson.loads(orjson.dumps(DOCUMENT))
