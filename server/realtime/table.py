"""MessageTable: the ``RouteTableDef`` of messages.

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


class Nothing(Schema):
    """An ack without data."""


@dataclass(frozen=True)
class Message:
    event: str
    schema: Schema
    ack: Schema
    handler: Handler
    summary: str


class MessageTable:
    def __init__(self) -> None:
        self._messages: list[Message] = []

    def on(self, event: str, schema: type[Schema], *, ack: type[Schema] = Nothing) -> Callable[[Handler], Handler]:
        """Register a handler; ``ack`` describes its return value for the AsyncAPI document."""

        def add(handler: Handler) -> Handler:
            summary = (handler.__doc__ or "").partition("\n")[0].strip()
            self._messages.append(Message(event, schema(), ack(), handler, summary))
            return handler

        return add

    def __iter__(self) -> Iterator[Message]:
        return iter(self._messages)


def merge(tables: Iterable[MessageTable]) -> dict[str, Message]:
    """Merge the tables into one mapping by event.

    Raises:
        RuntimeError: two tables define the same event.
    """
    merged: dict[str, Message] = {}
    for table in tables:
        for message in table:
            if message.event in merged:
                raise RuntimeError(f"two handlers for {message.event}")
            merged[message.event] = message
    return merged
