"""An editor for tests: a Yjs document that stays in sync with the server over the JSON socket."""

import asyncio
import itertools
import random
from base64 import b64decode, b64encode

import aiohttp
from pycrdt import Doc, Text

from server.documents import wire
from tests.actors import Actor
from tests.sockets import Closed, ErrorReply, SocketClient
from tests.timeouts import WAIT_TIMEOUT_SECONDS

RECONNECT_SECONDS = 30.0
FAILURES = (ErrorReply, Closed, aiohttp.ClientError, OSError, TimeoutError)


class Editor:
    """A client that types, receives the edits of others, and resends unacknowledged edits after a disconnect."""

    def __init__(self, actor: Actor, document: str) -> None:
        self.actor, self.document = actor, document
        self.doc: Doc[Text] = Doc()
        self.content = self.doc.get("content", type=Text)
        self.socket: SocketClient
        self.version = 0

    @property
    def text(self) -> str:
        return str(self.content)

    async def open(self) -> "Editor":
        """Connect and sync with the server: each side sends the updates that the other is missing."""
        self.socket = await self.actor.connect()
        opened = await self.socket.push(
            "document:open", documentId=self.document, stateVector=b64encode(self.doc.get_state()).decode()
        )
        self.doc.apply_update(b64decode(opened["update"]))
        self.version = opened["version"]
        lacking = self.doc.get_update(b64decode(opened["stateVector"]))
        if lacking != b"\x00\x00":
            await self.send(lacking)
        return self

    async def type(self, text: str, *, at: int | None = None) -> int:
        """Insert, wait for the ack, and return the version."""
        return await self.send(self.insert(text, at=at))

    def insert(self, text: str, *, at: int | None = None) -> bytes:
        before = self.doc.get_state()
        self.content.insert(len(self.content) if at is None else at, text)
        return self.doc.get_update(before)

    async def send(self, update: bytes) -> int:
        """Send an update and return its version; retry once after ``retryAfter`` if the server is unavailable."""
        data = {"documentId": self.document, "update": b64encode(update).decode()}
        try:
            ack = await self.socket.push("document:update", **data)
        except ErrorReply as refusal:
            if refusal.code != "unavailable":
                raise
            await asyncio.sleep(refusal.data["retryAfter"])
            ack = await self.socket.push("document:update", **data)
        self.hear()
        return ack["version"]

    def hear(self) -> None:
        """Apply the updates that have arrived so far."""
        while self.socket.received:
            self._apply(self.socket.received.popleft())

    async def until(self, text: str) -> None:
        """Wait until the document has this text."""
        async with asyncio.timeout(WAIT_TIMEOUT_SECONDS):
            while self.text != text:
                self._apply(await self.socket.next(seconds=WAIT_TIMEOUT_SECONDS))

    async def show(self, *entries: wire.Entry) -> None:
        state = b64encode(wire.awareness_content(entries)).decode()
        await self.socket.push("document:awareness", documentId=self.document, state=state)

    async def sees(self) -> list[wire.Entry]:
        """Wait for the next awareness states of other editors."""
        while (frame := await self.socket.next())["event"] != "document:awareness":
            self._apply(frame)
        return wire.parse_awareness(b64decode(frame["data"]["state"]))

    async def mark(self, name: str, acknowledged: list[str]) -> None:
        """Type numbered marks one after the other until a failure; record the acknowledged ones."""
        try:
            for number in itertools.count():
                mark = f"<{name}{number}>"
                await self.type(mark, at=0)
                acknowledged.append(mark)
        except FAILURES:
            return

    async def type_at_random(self, characters: str, *, seed: int, disconnects: float = 0.0) -> None:
        """Type characters one by one at random places; reconnect and continue after a failure or a disconnect."""
        chance = random.Random(seed)
        for character in characters:
            before = self.text[: chance.randrange(len(self.text) + 1)]
            update = self.insert(character, at=len(before.encode()))
            if chance.random() < disconnects:
                await self.socket.raw.close()
            await self.deliver(update)

    async def deliver(self, update: bytes) -> None:
        """Resend an update, with reconnects, until it is acknowledged."""
        while True:
            try:
                await self.send(update)
            except FAILURES:
                await self.reconnect()
            else:
                return

    async def reconnect(self) -> None:
        await self.socket.raw.close()
        async with asyncio.timeout(RECONNECT_SECONDS):
            while True:
                try:
                    await self.open()
                except FAILURES:
                    await asyncio.sleep(0.1)
                else:
                    return

    def _apply(self, frame: dict) -> None:
        if frame["event"] == "document:update":
            self.doc.apply_update(b64decode(frame["data"]["update"]))


async def make_document(actor: Actor, workspace: str, *, path: str = "main.py", content: str = "") -> str:
    made = await actor.post(f"/workspaces/{workspace}/documents", {"path": path, "content": content})
    assert made.status == 201, made
    return made["id"]
