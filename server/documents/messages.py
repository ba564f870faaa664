"""Documents through the JSON socket."""

import binascii
from base64 import b64decode, b64encode
from collections.abc import Mapping
from typing import Any
from uuid import UUID

from marshmallow import ValidationError, fields, validate

from server.documents import wire
from server.documents.live import demand_vector
from server.documents.news import Sight, Update
from server.documents.rooms import Rooms
from server.errors import Conflict, ServiceError, Unavailable, ValidationFailed
from server.fields import Id, Schema
from server.projects.access import Role, requires, resource_ids
from server.realtime.connection import Connection
from server.realtime.grants import ResourceRef, Revocation
from server.realtime.hub import MAX_ROOMS_PER_CONNECTION
from server.realtime.outbox import Delivery
from server.realtime.table import MessageTable

messages = MessageTable()
MOST_HELD_BYTES = 4 << 20  # for one who opens: what is edited before the ack is sent


class Base64(fields.String):
    """Bytes as standard, padded Base64."""

    def _deserialize(self, value: Any, attr: str | None, data: Mapping[str, Any] | None, **options: Any) -> bytes:  # type: ignore[override]
        try:
            return b64decode(super()._deserialize(value, attr, data, **options), validate=True)
        except (ValueError, binascii.Error):
            raise ValidationError("Not valid Base64.") from None


class OpenDocument(Schema):
    document_id = Id(required=True)
    state_vector = Base64(
        load_default=None, allow_none=True, metadata={"description": "Base64: the client's Yjs state vector"}
    )


class OpenedDocument(Schema):
    document_id = Id(required=True)
    update = fields.String(required=True, metadata={"description": "Base64: the Yjs update that the client is missing"})
    state_vector = fields.String(
        required=True,
        metadata={"description": "Base64: the server's Yjs state vector; send the updates that it is missing"},
    )
    version = fields.Integer(required=True)


class CloseDocument(Schema):
    document_id = Id(required=True)


class UpdateDocument(Schema):
    document_id = Id(required=True)
    update = Base64(required=True, metadata={"description": "Base64: a Yjs update"})


class UpdatedDocument(Schema):
    version = fields.Integer(required=True, validate=validate.Range(min=1))


class ShowAwareness(Schema):
    document_id = Id(required=True)
    state = Base64(required=True, metadata={"description": "Base64: a y-protocols awareness update"})


class JsonEditor:
    """A connection that has a document open, as its room's ``Listener``."""

    def __init__(self, connection: Connection, document: UUID) -> None:
        self.id = connection.id
        self._connection = connection
        self._document = document
        self._held: list[Update] | None = []
        self._held_bytes = 0

    def hear(self, update: Update) -> None:
        if self._held is None:
            self._connection.write(update.json_frame)
            return
        self._held.append(update)
        self._held_bytes += len(update.data)
        if self._held_bytes > MOST_HELD_BYTES:
            self._connection.close(1013, "client reads too slowly")

    def see(self, sight: Sight) -> None:
        if self._held is None:
            key = (self._document, sight.entry.client)
            self._connection.write(sight.json_frame, Delivery.COALESCED, key)

    def restart(self) -> None:
        """Each of its updates is answered by itself."""

    def lost(self) -> None:
        self._connection.revoke(ResourceRef("document", self._document), Revocation("deleted"))

    def release(self, version: int) -> None:
        """The ack has been sent, with all up to this version: from now on everything at once."""
        held, self._held = self._held or [], None
        for update in held:
            if update.version > version:
                self.hear(update)


@messages.on("document:open", OpenDocument, ack=OpenedDocument)
@requires(Role.VIEWER, of=resource_ids("documentId"))
async def open_document(socket: Connection, data: dict[str, Any]) -> dict[str, Any]:
    """Open a document: get the missing updates, and receive every edit from now on."""
    document, rooms = data["document_id"], _rooms(socket)
    thing = ResourceRef("document", document)
    if thing not in socket.grants and len(socket.grants) >= MAX_ROOMS_PER_CONNECTION:
        raise Conflict(
            f"Connection exceeds the maximum of {MAX_ROOMS_PER_CONNECTION} joined workspaces and open documents"
        )
    demand_vector(data["state_vector"])  # before another opening of the same is given up
    editor = JsonEditor(socket, document)
    try:
        await rooms.enter(document, editor)
        update, vector, version = await rooms.difference(document, data["state_vector"])
        if socket.close_code is not None:
            raise Unavailable("Connection is closing")
    except BaseException:
        socket.grants.pop(thing, None)
        rooms.leave(document, socket.id)
        raise
    socket.realtime.grant(socket, thing)

    def begin() -> None:
        editor.release(version)
        for sight in rooms.sights(document):
            editor.see(sight)

    socket.after_reply(begin)
    return {
        "documentId": document,
        "update": b64encode(update).decode(),
        "stateVector": b64encode(vector).decode(),
        "version": version,
    }


@messages.on("document:update", UpdateDocument, ack=UpdatedDocument)
@requires(Role.COLLABORATOR, of=resource_ids("documentId"))
async def update_document(socket: Connection, data: dict[str, Any]) -> dict[str, Any]:
    """Edit an open document; acknowledged when it is durable."""
    document = data["document_id"]
    _demand_open(socket, document)
    version = await _rooms(socket).edit(document, author=socket.user.id, update=data["update"], origin=socket.id)
    return {"version": version}


@messages.on("document:awareness", ShowAwareness)
@requires(Role.VIEWER, of=resource_ids("documentId"))
async def show_awareness(socket: Connection, data: dict[str, Any]) -> None:
    """Broadcast an awareness state to the other editors; ephemeral."""
    _demand_open(socket, data["document_id"])
    try:
        entries = wire.parse_awareness(data["state"])
        _rooms(socket).say(data["document_id"], socket.id, socket.user.id, entries)
    except wire.Malformed as error:
        raise ValidationFailed(f"Awareness state is malformed: {error}") from None


@messages.on("document:close", CloseDocument)
@requires(Role.VIEWER, of=resource_ids("documentId"))
async def close_document(socket: Connection, data: dict[str, Any]) -> None:
    """Close a document."""
    document = data["document_id"]
    _demand_open(socket, document)
    socket.grants.pop(ResourceRef("document", document), None)
    _rooms(socket).leave(document, socket.id)


def _demand_open(socket: Connection, document: UUID) -> None:
    if ResourceRef("document", document) not in socket.grants or _rooms(socket).listener(document, socket.id) is None:
        raise ServiceError("Document is not open on this connection", code="not_open")


def _rooms(socket: Connection) -> Rooms:
    rooms: Rooms = socket.realtime.documents
    return rooms
