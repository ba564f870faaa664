"""The table of the messages that clients send on ``/ws``, in the manner of aiohttp's ``RouteTableDef``.

``@messages.on("cursor:update", CursorUpdate)`` decorates ``async def update_cursor(socket, data) -> ack``. The
handler returns the data of the ack, and raises ServiceError to reject the message.
"""

from collections.abc import Awaitable, Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from server.fields import Schema

if TYPE_CHECKING:
    from server.realtime.connection import Connection

Handler = Callable[["Connection", dict[str, Any]], Awaitable[dict[str, Any] | None]]


class EmptyAck(Schema):
    """An ack without data."""


@dataclass(frozen=True)
class MessageDef:
    event: str
    schema: Schema
    ack: Schema
    handler: Handler
    summary: str


class MessageTable:
    def __init__(self) -> None:
        self._messages: list[MessageDef] = []

    def on(self, event: str, schema: type[Schema], *, ack: type[Schema] = EmptyAck) -> Callable[[Handler], Handler]:
        """Register a handler; ``ack`` describes its return value for the AsyncAPI document."""

        def add(handler: Handler) -> Handler:
            summary = (handler.__doc__ or "").partition("\n")[0].strip()
            self._messages.append(MessageDef(event, schema(), ack(), handler, summary))
            return handler

        return add

    def __iter__(self) -> Iterator[MessageDef]:
        return iter(self._messages)


def merge(tables: Iterable[MessageTable]) -> dict[str, MessageDef]:
    """Merge the tables into one mapping by event.

    Raises:
        RuntimeError: two tables define the same event.
    """
    merged: dict[str, MessageDef] = {}
    for table in tables:
        for message in table:
            if message.event in merged:
                raise RuntimeError(f"two handlers for {message.event}")
            merged[message.event] = message
    return merged
