"""Schemas of workspaces; those of responses are defined in ``projects`` and ``realtime``, and passed on here."""

from typing import Any

from marshmallow import fields, validate

from server.fields import Id, JsonObject, Name, Schema
from server.projects.schemas import Workspace
from server.realtime.events import UserHere
from server.rest.pagination import PageQuery

__all__ = ["EventsQuery", "NewWorkspace", "UserHere", "Workspace", "WorkspaceChange"]


def workspace_name_field(**options: Any) -> Name:
    return Name(1, 100, metadata={"example": "Number crunching"}, **options)


class EventsQuery(PageQuery):
    after = fields.String(
        load_default=None,
        validate=validate.Length(max=64),
        metadata={"description": "an event id; default: from the oldest event"},
    )


class NewWorkspace(Schema):
    project_id = Id(required=True)
    name = workspace_name_field(required=True)
    description = fields.String(load_default="", validate=validate.Length(max=500))
    meta = JsonObject(load_default=dict)


class WorkspaceChange(Schema):
    name = workspace_name_field()
    description = fields.String(validate=validate.Length(max=500))
    meta = JsonObject()
