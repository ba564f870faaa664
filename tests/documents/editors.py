"""An editor as tests speak of it: a Yjs document in step with the server's, through the JSON socket."""

import asyncio
import itertools
import random
from base64 import b64decode, b64encode

import aiohttp
from pycrdt import Doc, Text

from server.documents import wire
from tests.actors import Actor
from tests.patience import PATIENCE_SECONDS
from tests.sockets import Closed, Refused, Socket

RECONNECT_SECONDS = 30.0
FAILURES = (Refused, Closed, aiohttp.ClientError, OSError, TimeoutError)


class Editor:
    """Types, hears others, and after a disconnect sends again what was not acknowledged."""

    def __init__(self, actor: Actor, document: str) -> None:
        self.actor, self.document = actor, document
        self.doc: Doc[Text] = Doc()
        self.content = self.doc.get("content", type=Text)
        self.socket: Socket
        self.version = 0

    @property
    def text(self) -> str:
        return str(self.content)

    async def open(self) -> "Editor":
        """Connect, and compare with the server: what either lacks is sent."""
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
        """Insert and wait for the ack; the version."""
        return await self.send(self.insert(text, at=at))

    def insert(self, text: str, *, at: int | None = None) -> bytes:
        before = self.doc.get_state()
        self.content.insert(len(self.content) if at is None else at, text)
        return self.doc.get_update(before)

    async def send(self, update: bytes) -> int:
        """The version; what could not be saved in time is sent once more, as it is told."""
        data = {"documentId": self.document, "update": b64encode(update).decode()}
        try:
            ack = await self.socket.push("document:update", **data)
        except Refused as refusal:
            if refusal.code != "unavailable":
                raise
            await asyncio.sleep(refusal.data["retryAfter"])
            ack = await self.socket.push("document:update", **data)
        self.hear()
        return ack["version"]

    def hear(self) -> None:
        """Apply what has arrived so far."""
        while self.socket.heard:
            self._apply(self.socket.heard.popleft())

    async def until(self, text: str) -> None:
        """Returns when the document reads so."""
        async with asyncio.timeout(PATIENCE_SECONDS):
            while self.text != text:
                self._apply(await self.socket.next(seconds=PATIENCE_SECONDS))

    async def show(self, *entries: wire.Entry) -> None:
        state = b64encode(wire.awareness_content(entries)).decode()
        await self.socket.push("document:awareness", documentId=self.document, state=state)

    async def sees(self) -> list[wire.Entry]:
        """The next cursors that are shown."""
        while (frame := await self.socket.next())["event"] != "document:awareness":
            self._apply(frame)
        return wire.parse_awareness(b64decode(frame["data"]["state"]))

    async def mark(self, name: str, acknowledged: list[str]) -> None:
        """Type numbered marks, one after the other, for as long as that works; note which were acknowledged."""
        try:
            for number in itertools.count():
                mark = f"<{name}{number}>"
                await self.type(mark, at=0)
                acknowledged.append(mark)
        except FAILURES:
            return

    async def type_at_random(self, characters: str, *, seed: int, disconnects: float = 0.0) -> None:
        """One by one at random places; after a failure or a disconnect it comes back and carries on."""
        chance = random.Random(seed)
        for character in characters:
            before = self.text[: chance.randrange(len(self.text) + 1)]
            update = self.insert(character, at=len(before.encode()))
            if chance.random() < disconnects:
                await self.socket.raw.close()
            await self.deliver(update)

    async def deliver(self, update: bytes) -> None:
        """Until it is acknowledged, whatever it takes."""
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
