"""What a room tells its listeners: encoded and framed once for each door, whatever their number."""

from base64 import b64encode
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol
from uuid import UUID

from server.documents import wire
from server.realtime.protocol import encode, websocket_frame


def binary_frame(payload: bytes) -> bytes:
    """An unmasked, final binary frame (RFC 6455, section 5.2)."""
    return b"\x82" + websocket_frame(payload)[1:]


@dataclass(frozen=True)
class Update:
    """An update that is in the log. ``author`` is None where it is several people's."""

    document: UUID
    version: int
    author: UUID | None
    data: bytes

    @cached_property
    def json_frame(self) -> bytes:
        data = {
            "documentId": self.document,
            "update": b64encode(self.data).decode(),
            "userId": self.author,
            "version": self.version,
        }
        return websocket_frame(encode("document:update", data))

    @cached_property
    def yjs_frame(self) -> bytes:
        return binary_frame(wire.sync(wire.UPDATE, self.data))


@dataclass(frozen=True)
class Sight:
    """What one client says of itself, stamped."""

    document: UUID
    user: UUID
    entry: wire.Entry

    @cached_property
    def content(self) -> bytes:
        return wire.awareness_content([self.entry])

    @cached_property
    def json_frame(self) -> bytes:
        data = {"documentId": self.document, "state": b64encode(self.content).decode(), "userId": self.user}
        return websocket_frame(encode("document:awareness", data))

    @cached_property
    def yjs_frame(self) -> bytes:
        return binary_frame(wire.awareness(self.content))


class Listener(Protocol):
    """Who has a document open, through either door."""

    id: str

    def hear(self, update: Update) -> None:
        """Somebody else's edit."""

    def see(self, sight: Sight) -> None:
        """Somebody else's cursor."""

    def restart(self) -> None:
        """What it sent, or was shown as known, may not be in the log: it must compare, and send again."""

    def lost(self) -> None:
        """The document was deleted."""


def write_updates(updates: list[Update]) -> bytes:
    """For other processes; all of one document."""
    return b"".join(
        wire.number(each.version) + (each.author or UUID(int=0)).bytes + wire.prefixed(each.data) for each in updates
    )


def read_updates(document: UUID, payload: bytes) -> list[Update]:
    reader, updates = wire.Reader(payload), []
    while reader.rest:
        version, author = reader.number(), UUID(bytes=reader.take(16))
        updates.append(Update(document, version, author if author.int else None, reader.bytes()))
    return updates


def write_sight(sight: Sight) -> bytes:
    return sight.user.bytes + sight.content


def read_sights(document: UUID, payload: bytes) -> list[Sight]:
    user, entries = UUID(bytes=payload[:16]), wire.parse_awareness(payload[16:])
    return [Sight(document, user, entry) for entry in entries]
