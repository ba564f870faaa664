"""A client socket for tests: ``push`` sends and returns the ack, ``assert_push`` and ``refute_push`` receive.

In every test the frames of the server are validated against the AsyncAPI document.
"""

import asyncio
import itertools
from collections import Counter, deque
from collections.abc import Awaitable, Callable
from functools import cache
from typing import Any

import aiohttp
import jsonschema
import orjson

from server.app import asyncapi_document
from tests.timeouts import WAIT_TIMEOUT_SECONDS

MAX_VALIDATED_PER_KIND = 20  # frames of a kind: some tests receive thousands
_validated: Counter[str] = Counter()


@cache
def frame_validators() -> dict[str, Any]:
    """Return the validators of all frames, by their names in the AsyncAPI document."""
    messages = asyncapi_document()["components"]["messages"]
    return {name: jsonschema.Draft202012Validator(message["payload"]) for name, message in messages.items()}


def validate_frame(frame: dict[str, Any], name: str) -> None:
    frame_validators()[name].validate(frame)


def schema_name_of(frame: dict[str, Any]) -> str:
    """Return the name in the AsyncAPI document of a frame that is not a reply."""
    event = frame["event"]
    return frame["data"]["type"] if event == "collaboration:event" else f"{event.replace(':', '.')}.push"


def _validate_first(frame: dict[str, Any], name: str) -> None:
    _validated[name] += 1
    if _validated[name] <= MAX_VALIDATED_PER_KIND:
        validate_frame(frame, name)


class ErrorReply(Exception):
    """The server replied with an error frame."""

    def __init__(self, data: dict[str, Any]) -> None:
        self.code, self.data = data["code"], data
        super().__init__(str(data))


class Closed(Exception):
    def __init__(self, code: int | None) -> None:
        self.code = code
        super().__init__(f"closed with {code}")


async def wait_until_rejected(attempt: Callable[[], Awaitable[Any]], code: str) -> None:
    """Repeat an attempt until the server rejects it with this code: access has ended."""
    async with asyncio.timeout(WAIT_TIMEOUT_SECONDS):
        while True:
            try:
                await attempt()
            except ErrorReply as error:
                if error.code != code:
                    raise
                return


class SocketClient:
    def __init__(self, raw: aiohttp.ClientWebSocketResponse) -> None:
        self.raw = raw
        self.welcome: dict[str, Any] = {}
        self.joined: dict[str, Any] = {}
        self.received: deque[dict[str, Any]] = deque()  # pushes that arrived while the test waited for another frame
        self._ids = itertools.count(1)

    async def next(self, *, seconds: float = WAIT_TIMEOUT_SECONDS) -> dict[str, Any]:
        """Return the next frame, in the order of arrival."""
        if self.received:
            return self.received.popleft()
        return await self._receive(seconds)

    async def push(self, event: str, **data: Any) -> dict[str, Any]:
        """Send a message with an id; return the data of its ack.

        Raises:
            ErrorReply: the reply is an error.
        """
        id = next(self._ids)
        await self.send(event, data, id=id)
        ack = await self.reply(id)
        _validate_first({"event": "ack", "data": ack, "id": id}, f"{event.replace(':', '.')}.ack")
        return ack

    async def reply(self, id: Any) -> dict[str, Any]:
        while True:
            frame = await self._receive(WAIT_TIMEOUT_SECONDS)
            if frame.get("id") != id:
                self.received.append(frame)
            elif frame["event"] == "error":
                raise ErrorReply(frame["data"])
            else:
                assert frame["event"] == "ack", frame
                return frame["data"]

    async def send(self, event: str, data: Any = None, **fields: Any) -> None:
        await self.raw.send_str(orjson.dumps({"event": event, "data": data or {}, **fields}).decode())

    async def assert_push(self, kind: str, *, seconds: float = WAIT_TIMEOUT_SECONDS, **fields: Any) -> dict[str, Any]:
        """Return the data of the next push, which must be of this kind (an event or a type of collaboration event)."""
        frame = await self.next(seconds=seconds)
        received = frame["data"].get("type", frame["event"])
        assert received == kind, frame
        assert fields.items() <= frame["data"].items(), frame
        return frame["data"]

    async def refute_push(self, *, seconds: float = 0.3) -> None:
        """Assert that no push arrives."""
        try:
            frame = await self.next(seconds=seconds)
        except TimeoutError:
            return
        raise AssertionError(f"received {frame}")

    async def closed(self, *, seconds: float = WAIT_TIMEOUT_SECONDS) -> int | None:
        """Wait until the server closes the socket; return the close code."""
        try:
            async with asyncio.timeout(seconds):
                while True:
                    self.received.append(await self._receive(seconds))
        except Closed as closed:
            return closed.code

    async def close(self) -> None:
        await self.raw.close()

    def abort(self) -> None:
        """Abort the connection without a close frame, as when the network of a client fails."""
        connection = self.raw._conn
        if connection is not None and connection.transport is not None:
            connection.transport.abort()

    async def _receive(self, seconds: float) -> dict[str, Any]:
        message = await self.raw.receive(timeout=seconds)
        if message.type in (aiohttp.WSMsgType.CLOSE, aiohttp.WSMsgType.CLOSED, aiohttp.WSMsgType.CLOSING):
            raise Closed(self.raw.close_code)
        assert message.type is aiohttp.WSMsgType.TEXT, message
        frame = orjson.loads(message.data)
        if frame["event"] != "ack":
            _validate_first(frame, schema_name_of(frame))
        return frame
