"""Unmodified y-websocket clients from npm, and raw sockets for input that no such client sends."""

import asyncio
import contextlib
import json
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from pycrdt import Doc, Text

from server.documents import updates, wire
from server.realtime.hub import Realtime
from tests.actors import Actor
from tests.conftest import MakeServer
from tests.documents.editors import Editor, make_document
from tests.processes import Processes
from tests.sockets import Closed
from tests.timeouts import WAIT_TIMEOUT_SECONDS

CLIENTS = Path(__file__).parent.parent / "clients"


class NodeEditor:
    """A WebsocketProvider in Node."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self.process = process

    async def do(self, what: str, **more: Any) -> Any:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps({"do": what, **more}).encode() + b"\n")
        async with asyncio.timeout(WAIT_TIMEOUT_SECONDS):
            return json.loads(await self.process.stdout.readline())

    async def until(self, **state: Any) -> dict[str, Any]:
        """Wait until the client has the expected state, and return its whole state."""
        deadline = time.monotonic() + WAIT_TIMEOUT_SECONDS
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


async def test_y_websocket_client_edits_together_with_a_json_client(
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


async def test_awareness_crosses_both_socket_transports(
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


async def test_y_websocket_client_syncs_offline_edits_after_a_restart(
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
    processes.server(PORT=base.rpartition(":")[2]).wait_for_output("server ready")
    await other.until(text="before meanwhile")
    client = (await hers.until(synced=True))["clientId"]
    await other.until(others=[[client, {"name": "Alice"}]])


async def test_client_of_a_viewer_receives_edits_but_cannot_edit(
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


async def test_client_of_a_removed_collaborator_does_not_reconnect(
    alice: Actor, bob: Actor, start_node: StartNode
) -> None:
    project = await alice.make_project()
    member = await alice.add(bob, project)
    document = await make_document(alice, await alice.make_workspace(project))
    his = await start_node(bob, document)
    await his.until(synced=True)
    await alice.delete(f"/projects/{project}/collaborators/{member}")
    await his.until(connected=False, trying=False, closed=[4403])


async def test_client_of_an_ended_session_does_not_reconnect(
    alice: Actor, bob: Actor, workspace: str, start_node: StartNode
) -> None:
    document = await make_document(alice, workspace)
    his = await start_node(bob, document)
    await his.until(synced=True)
    await bob.post("/auth/logout")
    await his.until(connected=False, trying=False, closed=[4401])


async def test_client_of_a_deleted_document_does_not_reconnect(
    alice: Actor, bob: Actor, workspace: str, start_node: StartNode
) -> None:
    document = await make_document(alice, workspace)
    his = await start_node(bob, document)
    await his.until(synced=True)
    await alice.delete(f"/documents/{document}")
    await his.until(connected=False, trying=False, closed=[4404])
    late = await start_node(bob, document)
    await late.until(connected=False, trying=False, closed=[4404])


async def test_rejected_client_gets_a_close_code_with_the_reason(
    alice: Actor, carol: Actor, workspace: str, http: aiohttp.ClientSession
) -> None:
    document = await make_document(alice, workspace)

    async def code(path: str, *protocols: str) -> int | None:
        async with http.ws_connect(f"{alice.base}/yjs/{path}", protocols=protocols) as socket:
            while (message := await socket.receive(timeout=WAIT_TIMEOUT_SECONDS)).type is aiohttp.WSMsgType.BINARY:
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
    while True:  # edits of others may come first
        message = wire.parse((await socket.receive(timeout=WAIT_TIMEOUT_SECONDS)).data)
        if isinstance(message, wire.Sync) and message.step == wire.STEP_1:
            return socket


async def compared(socket: aiohttp.ClientWebSocketResponse) -> bytes:
    """Return the whole state, once all earlier messages are durable; empty if the socket is closed instead."""
    with contextlib.suppress(aiohttp.ClientConnectionResetError):
        await socket.send_bytes(wire.sync(wire.STEP_1, b"\x00"))
    while (message := await socket.receive(timeout=WAIT_TIMEOUT_SECONDS)).type is aiohttp.WSMsgType.BINARY:
        answer = wire.parse(message.data)
        if isinstance(answer, wire.Sync) and answer.step == wire.STEP_2:
            return answer.payload
    return b""


async def closed_with(socket: aiohttp.ClientWebSocketResponse) -> int | None:
    while (await socket.receive(timeout=WAIT_TIMEOUT_SECONDS)).type is aiohttp.WSMsgType.BINARY:
        continue
    return socket.close_code


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
async def test_hostile_frame_closes_only_its_socket(
    alice: Actor, bob: Actor, workspace: str, hostile: bytes | str
) -> None:
    document = await make_document(alice, workspace)
    his = await Editor(bob, document).open()
    socket = await raw_socket(alice, document)
    await (socket.send_str(hostile) if isinstance(hostile, str) else socket.send_bytes(hostile))
    assert await closed_with(socket) == 4400
    assert await his.type("fine") == 2


async def test_known_update_makes_no_version(alice: Actor, workspace: str) -> None:
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


async def test_resent_deletions_make_no_version(alice: Actor, bob: Actor, workspace: str) -> None:
    document = await make_document(alice, workspace, content="hello world")
    hers, his = await Editor(alice, document).open(), await Editor(bob, document).open()
    before = hers.doc.get_state()
    del hers.content[0:6]
    deleted = hers.doc.get_update(before)
    assert [await hers.send(deleted) for _ in range(3)] == [2, 2, 2]
    await his.until("world")
    await his.reconnect()
    socket = await raw_socket(bob, document)
    await socket.send_bytes(wire.sync(wire.STEP_2, his.doc.get_update()))
    await compared(socket)
    await socket.close()
    read = await alice.get(f"/documents/{document}")
    assert (read["version"], read["updatedBy"]) == (2, alice.id)


@pytest.mark.usefixtures("no_periodic_recheck")
async def test_socket_of_a_removed_collaborator_is_closed(alice: Actor, bob: Actor, make_server: MakeServer) -> None:
    project = await alice.make_project()
    member = await alice.add(bob, project)
    document = await make_document(alice, await alice.make_workspace(project))
    hers, socket = await Editor(alice, document).open(), await raw_socket(bob.at(await make_server()), document)
    await alice.delete(f"/projects/{project}/collaborators/{member}")
    assert await closed_with(socket) == 4403
    assert await hers.type("alone") == 2


async def test_socket_outlasts_its_token_but_not_its_session(
    alice: Actor, workspace: str, make_server: MakeServer
) -> None:
    document = await make_document(alice, workspace)
    brief = await alice.at(await make_server(access_token_ttl=2)).log_in()
    socket, json_socket = await raw_socket(brief, document), await brief.connect()
    await json_socket.assert_push("token:expiring")
    with pytest.raises(Closed, match="4401"):
        await json_socket.next()
    assert await compared(socket)
    sessions = (await alice.get("/auth/sessions"))["items"]
    [ended] = [each["id"] for each in sessions if not each["current"]]
    await alice.delete(f"/auth/sessions/{ended}")
    assert await closed_with(socket) == 4401


async def test_ticket_opens_a_socket_and_foreign_origin_is_rejected(
    alice: Actor, workspace: str, http: aiohttp.ClientSession, make_server: MakeServer
) -> None:
    document = await make_document(alice, workspace)
    base = await make_server(cors_origin=("https://ours.example",))
    ticket = (await alice.at(base).post("/auth/ws-ticket"))["ticket"]
    async with http.ws_connect(f"{base}/yjs/{document}?ticket={ticket}") as socket:
        assert await compared(socket)
    with pytest.raises(aiohttp.WSServerHandshakeError) as refused:
        await http.ws_connect(f"{base}/yjs/{document}", headers={"Origin": "https://theirs.example"})
    assert refused.value.status == 403


async def test_restart_closes_the_socket_with_1012_so_that_the_client_reconnects(
    alice: Actor, workspace: str, processes: Processes
) -> None:
    server = processes.server()
    socket = await raw_socket(alice.at(server.base), await make_document(alice, workspace))
    ending = asyncio.ensure_future(asyncio.to_thread(server.terminate))
    assert await closed_with(socket) == 1012
    assert await ending == 0


async def test_update_beyond_the_maximum_size_closes_the_socket(alice: Actor, workspace: str) -> None:
    document = await make_document(alice, workspace)
    first, second, third = [await raw_socket(alice, document) for _ in range(3)]
    await first.send_bytes(wire.sync(wire.UPDATE, updates.first("x" * (6 << 20))))
    await compared(first)
    await second.send_bytes(wire.sync(wire.UPDATE, updates.first("y" * (6 << 20))))
    assert await closed_with(second) == 4400
    with contextlib.suppress(OSError):  # the server does not read it to its end
        await third.send_bytes(wire.sync(wire.UPDATE, updates.first("z" * (10 << 20))))
    assert await closed_with(third) in (1009, 1006)
    assert (await alice.get(f"/documents/{document}"))["version"] == 2
    await first.close()


async def test_unexpected_error_closes_the_socket_with_a_close_frame(
    alice: Actor, workspace: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def fail(*_: object) -> None:
        raise RuntimeError

    socket = await raw_socket(alice, await make_document(alice, workspace))
    monkeypatch.setattr("server.documents.rooms.Rooms.difference", fail)
    await socket.send_bytes(wire.sync(wire.STEP_1, b"\x00"))
    assert await closed_with(socket) == 1011


async def test_idle_awareness_state_is_renewed_before_clients_drop_it(
    alice: Actor, bob: Actor, workspace: str, make_server: MakeServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("server.documents.awareness.RENEW_SECONDS", 0.2)
    document = await make_document(alice, workspace)
    his = await Editor(bob, document).open()
    sockets = [await raw_socket(alice, document), await raw_socket(alice.at(await make_server()), document)]
    await his.show(wire.Entry(77, 1, '{"name":"Bob"}'))
    for socket in sockets:
        clocks: list[int] = []
        while len(clocks) < 2:
            seen = wire.parse((await socket.receive(timeout=WAIT_TIMEOUT_SECONDS)).data)
            assert isinstance(seen, wire.Awareness)
            clocks += [entry.clock for entry in seen.entries if entry.client == 77]
        assert clocks[0] < clocks[1]
        await socket.close()
    await his.socket.refute_push()  # no echo


async def test_silent_client_receives_keepalive_messages(
    alice: Actor, workspace: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("server.documents.yjs.KEEPALIVE_SECONDS", 0.3)
    socket = await raw_socket(alice, await make_document(alice, workspace))
    heard = [(await socket.receive(timeout=WAIT_TIMEOUT_SECONDS)).data for _ in range(4)]
    assert heard.count(wire.KEEPALIVE) >= 3
    await socket.close()


@pytest.mark.parametrize("door", ["/ws", "/yjs/{document}"])
async def test_client_registered_while_draining_begins_is_closed_with_1012(
    alice: Actor, workspace: str, door: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Authentication succeeds before the drain, and the registration follows after the drain closed all others."""
    document = await make_document(alice, workspace)
    admit = Realtime.register

    def begin_to_stop(self: Realtime, peer: Any, **more: Any) -> None:
        self.draining = True
        admit(self, peer, **more)

    monkeypatch.setattr(Realtime, "register", begin_to_stop)
    door = door.format(document=document)
    async with alice.http.ws_connect(f"{alice.base}{door}", headers=alice.headers) as socket:
        async for _ in socket:
            pass
        assert socket.close_code == 1012
