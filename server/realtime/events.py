"""The server's pushes: every frame that it sends except ``ack``, with the schema of its data.

The AsyncAPI document and the history of events over REST use these schemas. The code that sends a frame builds it
without them; a test validates real frames against them.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from marshmallow import INCLUDE, fields, validate
from marshmallow import Schema as AnySchema

from server.errors import ERROR_CODES
from server.fields import Id, Schema, Timestamp

Shape = Mapping[str, fields.Field[Any]]


@dataclass(frozen=True)
class Push:
    """A kind of frame of the server; ``type`` distinguishes collaboration events."""

    event: str
    schema: AnySchema
    summary: str
    type: str | None = None

    @property
    def name(self) -> str:
        return self.type or self.event


class UserHere(Schema):
    user_id = Id(required=True)
    user_name = fields.String(required=True)
    connections = fields.Integer(required=True)


class CollaborationEvent(Schema):
    """An event of a workspace; ``type`` determines the further fields."""

    type = fields.String(required=True, metadata={"example": "WORKSPACE_UPDATED"})
    workspace_id = Id(required=True)
    user_id = Id(required=True, allow_none=True, metadata={"description": "the user who caused it; null if unknown"})
    user_name = fields.String(required=True)
    timestamp = Timestamp(required=True)


class AnyEvent(CollaborationEvent):
    """An event of any type, with the further fields of its type."""

    class Meta(Schema.Meta):
        unknown = INCLUDE


def event_id() -> fields.Field[Any]:
    return fields.String(
        required=True,
        validate=validate.Regexp(r"^\d+-\d+$"),
        metadata={"description": "`<ms>-<n>`, compared as two integers", "example": "1780000000000-0"},
    )


def push(event: str, summary: str, **shape: fields.Field[Any]) -> Push:
    return Push(event, Schema.from_dict(dict(shape), name=event)(), summary)


def collaboration_event(type: str, summary: str, *, durable: bool, **shape: fields.Field[Any]) -> Push:
    attributes: dict[str, Any] = {"type": fields.Constant(type, required=True), **shape}
    if durable:
        attributes["event_id"] = event_id()
    return Push("collaboration:event", _derived(type, attributes), summary, type)


def _derived(name: str, attributes: dict[str, Any]) -> AnySchema:
    schema: type[Schema] = type(name, (CollaborationEvent,), attributes)
    return schema()


def _users() -> fields.Field[Any]:
    return fields.List(fields.Nested(UserHere), required=True)


def _document() -> dict[str, fields.Field[Any]]:
    return {
        "document_id": Id(required=True),
        "path": fields.String(required=True),
        "version": fields.Integer(required=True),
    }


def _any_value() -> fields.Field[Any]:
    return fields.Raw(allow_none=True, metadata={"description": "exactly as the sender sent it"})


PUSHES: tuple[Push, ...] = (
    push(
        "welcome",
        "The first frame of the server: the user of the connection, the heartbeat and the limits",
        connection_id=fields.String(required=True),
        user_id=Id(required=True),
        user_name=fields.String(required=True),
        heartbeat_seconds=fields.Float(required=True),
        max_message_bytes=fields.Integer(required=True),
        token_expires_at=Timestamp(required=True),
    ),
    collaboration_event("USER_JOIN", "A user's first connection has joined", durable=False),
    collaboration_event("USER_LEAVE", "A user's last connection has left", durable=False),
    collaboration_event(
        "FILE_CHANGE",
        "A collaborator reports a change",
        durable=True,
        file_id=fields.String(allow_none=True),
        path=fields.String(allow_none=True),
        change=_any_value(),
    ),
    collaboration_event(
        "CURSOR_UPDATE",
        "The current cursor of a member; ephemeral, at most 30 per second of each sender",
        durable=False,
        file_id=fields.String(allow_none=True),
        position=_any_value(),
    ),
    collaboration_event("DOCUMENT_CREATED", "A document was created", durable=True, **_document()),
    collaboration_event("DOCUMENT_CHANGED", "A document has a new version", durable=True, **_document()),
    collaboration_event("DOCUMENT_RENAMED", "A document has another path", durable=True, **_document()),
    collaboration_event("DOCUMENT_DELETED", "A document was deleted", durable=True, **_document()),
    collaboration_event("WORKSPACE_UPDATED", "The workspace was changed", durable=True),
    collaboration_event("WORKSPACE_DELETED", "The workspace was deleted; all members leave it", durable=True),
    collaboration_event("PROJECT_UPDATED", "The project was changed", durable=True, project_id=Id(required=True)),
    collaboration_event(
        "ROLE_CHANGED",
        "A member has another role in the project",
        durable=True,
        project_id=Id(required=True),
        subject_id=Id(required=True, metadata={"description": "the user whose role changed"}),
        role=fields.String(required=True, validate=validate.OneOf(["OWNER", "COLLABORATOR", "VIEWER"])),
    ),
    collaboration_event(
        "ACCESS_REVOKED",
        "The user lost access to this workspace or open document; sent to affected connections, which stay open",
        durable=False,
        workspace_id=Id(required=True, allow_none=True),
        document_id=Id(metadata={"description": "the document, if access to a document ended"}),
        reason=fields.String(required=True, validate=validate.OneOf(["removed", "left", "deleted"])),
    ),
    collaboration_event(
        "JOB_UPDATED",
        "A job of the workspace has another status",
        durable=True,
        job_id=fields.String(required=True),
        job_type=fields.String(required=True),
        status=fields.String(required=True),
    ),
    push(
        "workspace:resync",
        "The server resubscribed to this workspace after an outage; it has just sent the missed events",
        workspace_id=Id(required=True),
        users=_users(),
        last_event_id=event_id(),
        gap=fields.Boolean(required=True, metadata={"description": "true if some events are lost: reload over REST"}),
    ),
    push(
        "document:update",
        "A Yjs update of an open document",
        document_id=Id(required=True),
        update=fields.String(required=True, metadata={"description": "base64"}),
        user_id=Id(required=True, allow_none=True),
        version=fields.Integer(required=True),
    ),
    push(
        "document:awareness",
        "The awareness state of another editor; ephemeral",
        document_id=Id(required=True),
        state=fields.String(required=True, metadata={"description": "base64"}),
        user_id=Id(required=True),
    ),
    push("job:updated", "A job of the user has changed", job=fields.Dict(required=True)),
    push(
        "job:output",
        "A job of the user has written output; live only",
        job_id=fields.String(required=True),
        stream=fields.String(required=True, validate=validate.OneOf(["stdout", "stderr"])),
        offset=fields.Integer(required=True),
        text=fields.String(required=True),
    ),
    push("token:expiring", "Send `authenticate` with a new token soon", token_expires_at=Timestamp(required=True)),
    push(
        "server:draining",
        "The server shuts down gracefully: reconnect after this time",
        reconnect_after_ms=fields.Integer(required=True),
    ),
    push(
        "error",
        "The server rejected a frame; carries the `id` of that frame if it had one",
        code=fields.String(required=True, validate=validate.OneOf(sorted(ERROR_CODES))),
        message=fields.String(required=True),
        details=fields.List(fields.Dict()),
        retry_after=fields.Integer(metadata={"description": "seconds"}),
    ),
)
