"""What is said in a workspace."""

from typing import Any

from marshmallow import fields

from server.errors import ServiceError
from server.fields import Id, Schema, Text
from server.projects.access import Role, named, requires
from server.realtime.connection import Connection
from server.realtime.table import MessageTable
from server.resources import reported

messages = MessageTable()


class JoinWorkspace(Schema):
    workspace_id = Id(required=True)


class LeaveWorkspace(Schema):
    workspace_id = Id(required=True)


class FileChange(Schema):
    workspace_id = Id(required=True)
    file_id = Text(0, 256, allow_none=True)
    path = Text(0, 512, allow_none=True)
    change = fields.Raw(required=True, allow_none=True)


@messages.on("join:workspace", JoinWorkspace)
@requires(Role.VIEWER, of=named("workspaceId"))
async def join_workspace(socket: Connection, data: dict[str, Any]) -> dict[str, Any]:
    """Enter a workspace: see who is there and hear its events."""
    online, last = await socket.realtime.join(socket, data["workspace_id"])
    return {
        "workspaceId": data["workspace_id"],
        "role": socket.access.role.name,
        "users": [each.shown() for each in online],
        "lastEventId": last,
        "events": [],
        "gap": False,
        "more": False,
    }


@messages.on("leave:workspace", LeaveWorkspace)
async def leave_workspace(socket: Connection, data: dict[str, Any]) -> None:
    """Leave a workspace."""
    await socket.realtime.leave(socket, data["workspace_id"])


@messages.on("file:change", FileChange)
@requires(Role.COLLABORATOR, of=named("workspaceId"))
async def change_file(socket: Connection, data: dict[str, Any]) -> dict[str, Any]:
    """Tell the others about a change; acknowledged when it is in the workspace's history."""
    workspace = data["workspace_id"]
    if workspace not in socket.rooms:
        raise ServiceError("Join the workspace first", code="not_joined")
    sent = {key: data[name] for key, name in _SENT.items() if name in data}
    with reported():
        id = await socket.realtime.channels.announce(
            "FILE_CHANGE", workspace=workspace, user=socket.user.id, name=socket.name, origin=socket.id, **sent
        )
    return {"eventId": id}


_SENT = {"fileId": "file_id", "path": "path", "change": "change"}
