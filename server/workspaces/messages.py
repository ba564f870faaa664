"""Socket messages of a workspace: join, leave, file changes and cursors."""

from typing import Any
from uuid import UUID

from marshmallow import fields, validate
from orjson import Fragment

from server.errors import ServiceError
from server.fields import Id, Schema, Text
from server.projects.access import Role, requires, resource_ids
from server.realtime.connection import Connection
from server.realtime.events import UserHere
from server.realtime.history import parse_event_id
from server.realtime.table import MessageTable

messages = MessageTable()


class JoinWorkspace(Schema):
    workspace_id = Id(required=True)
    since = fields.String(
        load_default=None,
        allow_none=True,
        metadata={"description": "id of the last event you have received; null: no replay"},
    )


class JoinedWorkspace(Schema):
    workspace_id = Id(required=True)
    role = fields.String(required=True, validate=validate.OneOf([role.name for role in Role]))
    users = fields.List(fields.Nested(UserHere), required=True)
    last_event_id = fields.String(required=True)
    events = fields.List(fields.Dict(), required=True, metadata={"description": "missed events, at most 1 MiB"})
    gap = fields.Boolean(required=True, metadata={"description": "`since` is not in the history: reload over REST"})
    more = fields.Boolean(required=True, metadata={"description": "not joined yet: join again with the last `eventId`"})


class LeaveWorkspace(Schema):
    workspace_id = Id(required=True)


class FileChange(Schema):
    workspace_id = Id(required=True)
    file_id = Text(0, 256, allow_none=True)
    path = Text(0, 512, allow_none=True)
    change = fields.Raw(required=True, allow_none=True)


class FileChanged(Schema):
    event_id = fields.String(required=True)


class CursorUpdate(Schema):
    workspace_id = Id(required=True)
    file_id = Text(0, 256, allow_none=True)
    position = fields.Raw(required=True, allow_none=True)


@messages.on("join:workspace", JoinWorkspace, ack=JoinedWorkspace)
@requires(Role.VIEWER, of=resource_ids("workspaceId"))
async def join_workspace(socket: Connection, data: dict[str, Any]) -> dict[str, Any]:
    """Join a workspace: receive the users online, the missed events, and from now on every event."""
    since = None if data["since"] is None else parse_event_id(data["since"], field="since")
    replay, online = await socket.realtime.join(socket, data["workspace_id"], since=since)
    return {
        "workspaceId": data["workspace_id"],
        "role": socket.access.role.name,
        "users": [user.to_json() for user in online],
        "lastEventId": replay.last_event_id,
        "events": [Fragment(entry.event) for entry in replay.events],
        "gap": replay.gap,
        "more": replay.more,
    }


@messages.on("leave:workspace", LeaveWorkspace)
async def leave_workspace(socket: Connection, data: dict[str, Any]) -> None:
    """Leave a workspace."""
    await socket.realtime.leave(socket, data["workspace_id"])


@messages.on("file:change", FileChange, ack=FileChanged)
@requires(Role.COLLABORATOR, of=resource_ids("workspaceId"))
async def change_file(socket: Connection, data: dict[str, Any]) -> dict[str, Any]:
    """Broadcast a file change; acknowledged when it is in the workspace's history."""
    workspace = _require_joined(socket, data)
    id = await socket.realtime.announce("FILE_CHANGE", workspace=workspace, connection=socket, **_event_fields(data))
    return {"eventId": id}


@messages.on("cursor:update", CursorUpdate)
@requires(Role.VIEWER, of=resource_ids("workspaceId"))
async def update_cursor(socket: Connection, data: dict[str, Any]) -> None:
    """Broadcast your cursor position; ephemeral, the newest wins."""
    socket.realtime.update_cursor(_require_joined(socket, data), socket, **_event_fields(data))


def _require_joined(socket: Connection, data: dict[str, Any]) -> UUID:
    workspace: UUID = data["workspace_id"]
    if not socket.is_in(workspace):
        raise ServiceError("Join the workspace first", code="not_joined")
    return workspace


def _event_fields(data: dict[str, Any]) -> dict[str, Any]:
    return {key: data[name] for key, name in _EVENT_FIELD_NAMES.items() if name in data}


_EVENT_FIELD_NAMES = {"fileId": "file_id", "path": "path", "change": "change", "position": "position"}
