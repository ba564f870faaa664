"""y-websocket clients, unmodified, from npm; and what such a socket is told where no client would go."""

import asyncio
import json
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from pycrdt import Doc, Text

from server.documents import wire
from tests.actors import Actor
from tests.conftest import MakeServer
from tests.documents.editors import Editor, make_document
from tests.processes import Processes

CLIENTS = Path(__file__).parent.parent / "clients"
PATIENCE_SECONDS = 15.0


class NodeEditor:
    """A WebsocketProvider in Node."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self.process = process

    async def do(self, what: str, **more: Any) -> Any:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps({"do": what, **more}).encode() + b"\n")
        async with asyncio.timeout(PATIENCE_SECONDS):
            return json.loads(await self.process.stdout.readline())

    async def until(self, **state: Any) -> dict[str, Any]:
        """Its state, once that is as expected."""
        deadline = time.monotonic() + PATIENCE_SECONDS
        while not state.items() <= (now := await self.do("state")).items():
            assert time.monotonic() < deadline, now
            await asyncio.sleep(0.02)
        return now


StartNode = Callable[..., Awaitable[NodeEditor]]


@pytest.fixture
async def start_node(node: str) -> AsyncIterator[StartNode]:
    if not (CLIENTS / "node_modules").exists():
        pytest.skip("the clients are missing: npm ci --prefix tests/clients")
    running: list[asyncio.subprocess.Process] = []

    async def start(actor: Actor, document: str, *, token: str | None = None) -> NodeEditor:
        process = await asyncio.create_subprocess_exec(
            node,
            str(CLIENTS / "editor.mjs"),
            actor.base.replace("http", "ws") + "/yjs",
            document,
            token or actor.access_token,
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
        )
        running.append(process)
        return NodeEditor(process)

    yield start
    for process in running:
        process.kill()
        await process.communicate()


async def test_a_y_websocket_client_edits_together_with_a_json_client(
    alice: Actor, bob: Actor, workspace: str, start_node: StartNode, make_server: MakeServer
) -> None:
    document = await make_document(alice, workspace, content="Hello")
    hers = await start_node(alice, document)
    his = await Editor(bob.at(await make_server()), document).open()
    await hers.until(text="Hello", synced=True)
    await hers.do("insert", text=", é𝄞")
    await his.until("Hello, é𝄞")
    await his.type("!")
    await hers.until(text="Hello, é𝄞!")
    await hers.do("remove", at=0, length=5)
    await his.until(", é𝄞!")
    assert (await alice.get(f"/documents/{document}/content")).body == ", é𝄞!"
    await bob.put(f"/documents/{document}/content", data=b"over REST", headers={"If-Match": "*"})
    await hers.until(text="over REST")


async def test_cursors_are_seen_through_both_doors(
    alice: Actor, bob: Actor, workspace: str, start_node: StartNode
) -> None:
    document = await make_document(alice, workspace)
    hers, his = await start_node(alice, document), await Editor(bob, document).open()
    await hers.until(synced=True)
    entry = wire.Entry(77, 1, '{"name":"Bob","cursor":4}')
    await his.show(entry)
    await hers.until(others=[[77, {"name": "Bob", "cursor": 4}]])
    await hers.do("show", state={"name": "Alice"})
    client = (await hers.do("state"))["clientId"]
    while json.loads((seen := await his.sees())[0].state) != {"name": "Alice"}:
        continue
    assert seen[0].client == client
    await his.socket.close()
    await hers.until(others=[])


async def test_a_y_websocket_client_comes_back_after_a_restart_with_what_it_typed_meanwhile(
    alice: Actor, bob: Actor, workspace: str, start_node: StartNode, processes: Processes
) -> None:
    document = await make_document(alice, workspace)
    first = processes.server()
    base = first.base
    hers = await start_node(alice.at(base), document)
    other = await start_node(bob, document)
    await hers.until(synced=True)
    await hers.do("insert", text="before ")
    await hers.do("show", state={"name": "Alice"})
    await other.until(text="before ")
    first.kill()
    await hers.until(connected=False)
    await hers.do("insert", text="meanwhile")
    processes.server(PORT=base.rpartition(":")[2]).until("server ready")
    await other.until(text="before meanwhile")
    client = (await hers.until(synced=True))["clientId"]
    await other.until(others=[[client, {"name": "Alice"}]])


async def test_a_viewers_client_sees_everything_and_changes_nothing(
    alice: Actor, carol: Actor, workspace: str, start_node: StartNode
) -> None:
    project = (await alice.get(f"/workspaces/{workspace}"))["projectId"]
    await alice.add(carol, project, role="VIEWER")
    document = await make_document(alice, workspace, content="hers")
    viewers = await start_node(carol, document)
    hers = await Editor(alice, document).open()
    await viewers.until(text="hers", synced=True)
    await hers.sees()  # viewers have cursors too
    await viewers.do("insert", at=0, text="not ")
    await hers.socket.refute_push()
    await hers.type("!")
    await viewers.until(text="not hers!")
    assert (await alice.get(f"/documents/{document}/content")).body == "hers!"
    assert (await alice.get(f"/documents/{document}"))["version"] == 2


async def test_a_removed_collaborators_client_is_sent_away_for_good(
    alice: Actor, bob: Actor, start_node: StartNode
) -> None:
    project = await alice.make_project()
    member = await alice.add(bob, project)
    document = await make_document(alice, await alice.make_workspace(project))
    his = await start_node(bob, document)
    await his.until(synced=True)
    await alice.delete(f"/projects/{project}/collaborators/{member}")
    await his.until(connected=False, trying=False, closed=[4403])


async def test_the_client_of_an_ended_session_is_sent_away_for_good(
    alice: Actor, bob: Actor, workspace: str, start_node: StartNode
) -> None:
    document = await make_document(alice, workspace)
    his = await start_node(bob, document)
    await his.until(synced=True)
    await bob.post("/auth/logout")
    await his.until(connected=False, trying=False, closed=[4401])


async def test_a_deleted_documents_client_is_sent_away_for_good(
    alice: Actor, bob: Actor, workspace: str, start_node: StartNode
) -> None:
    document = await make_document(alice, workspace)
    his = await start_node(bob, document)
    await his.until(synced=True)
    await alice.delete(f"/documents/{document}")
    await his.until(connected=False, trying=False, closed=[4404])
    late = await start_node(bob, document)
    await late.until(connected=False, trying=False, closed=[4404])


async def test_who_may_not_come_in_is_told_why(
    alice: Actor, carol: Actor, workspace: str, http: aiohttp.ClientSession
) -> None:
    document = await make_document(alice, workspace)

    async def code(path: str, *protocols: str) -> int | None:
        async with http.ws_connect(f"{alice.base}/yjs/{path}", protocols=protocols) as socket:
            while (message := await socket.receive(timeout=5)).type is aiohttp.WSMsgType.BINARY:
                continue
            assert message.type is aiohttp.WSMsgType.CLOSE, message
            return socket.close_code

    assert await code(document) == 4401
    assert await code(document, "collab.v1", "bearer.nonsense") == 4401
    assert await code(document, "collab.v1", f"bearer.{carol.access_token}") == 4403
    assert await code("nonsense", "collab.v1", f"bearer.{alice.access_token}") == 4404
    unknown = "00000000-0000-4000-8000-000000000000"
    assert await code(unknown, "collab.v1", f"bearer.{alice.access_token}") == 4404


async def raw_socket(actor: Actor, document: str) -> aiohttp.ClientWebSocketResponse:
    socket = await actor.http.ws_connect(
        f"{actor.base}/yjs/{document}", protocols=("collab.v1", f"bearer.{actor.access_token}"), max_msg_size=0
    )
    assert socket.protocol == "collab.v1"
    first = wire.parse((await socket.receive(timeout=5)).data)
    assert isinstance(first, wire.Sync)
    assert first.step == wire.STEP_1
    return socket


async def compared(socket: aiohttp.ClientWebSocketResponse) -> bytes:
    """All there is; what was sent before is durable then."""
    await socket.send_bytes(wire.sync(wire.STEP_1, b"\x00"))
    while True:
        answer = wire.parse((await socket.receive(timeout=PATIENCE_SECONDS)).data)
        if isinstance(answer, wire.Sync):
            return answer.payload


@pytest.mark.parametrize(
    "hostile",
    [
        b"",
        b"\xff" * 20,
        wire.sync(wire.UPDATE, b"\x01\x02\x03"),
        wire.sync(wire.STEP_1, b"\xff\xff\xff"),
        wire.awareness(wire.awareness_content([wire.Entry(1, 1, "{not json")])),
        b"\x00\x02\xff\xff\xff\xff\x0f",
        "text",
    ],
)
async def test_a_hostile_frame_ends_that_socket_only(
    alice: Actor, bob: Actor, workspace: str, hostile: bytes | str
) -> None:
    document = await make_document(alice, workspace)
    his = await Editor(bob, document).open()
    socket = await raw_socket(alice, document)
    await (socket.send_str(hostile) if isinstance(hostile, str) else socket.send_bytes(hostile))
    while (await socket.receive(timeout=5)).type is aiohttp.WSMsgType.BINARY:
        continue
    assert socket.close_code == 4400
    assert await his.type("fine") == 2


async def test_what_the_server_has_already_makes_no_version(alice: Actor, workspace: str) -> None:
    document = await make_document(alice, workspace, content="text")
    socket = await raw_socket(alice, document)
    answer = await compared(socket)
    doc: Doc[Text] = Doc()
    text = doc.get("content", type=Text)
    doc.apply_update(answer)
    assert str(text) == "text"
    del text[0:2]
    await socket.send_bytes(wire.sync(wire.UPDATE, doc.get_update()))
    for _ in range(3):
        await socket.send_bytes(wire.sync(wire.STEP_2, doc.get_update()))
    await compared(socket)
    assert (await alice.get(f"/documents/{document}"))["version"] == 2
    assert (await alice.get(f"/documents/{document}/content")).body == "xt"
    await socket.close()


async def test_a_silent_client_is_spoken_to(alice: Actor, workspace: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("server.documents.yjs.KEEPALIVE_SECONDS", 0.3)
    socket = await raw_socket(alice, await make_document(alice, workspace))
    heard = [(await socket.receive(timeout=5)).data for _ in range(4)]
    assert heard.count(wire.KEEPALIVE) >= 3
    await socket.close()
