"""Schemas of projects, members and invitations for requests and responses."""

from typing import Any

from marshmallow import fields, validate

from server.auth.schemas import AnyEmail, Person, token_field
from server.fields import Id, JsonObject, Name, RawJson, Schema, Timestamp
from server.rest.pagination import PageQuery

ROLES = ("OWNER", "COLLABORATOR", "VIEWER")
SORTS = ("updatedAt", "-updatedAt", "createdAt", "-createdAt", "name", "-name")


def project_name_field(**options: Any) -> Name:
    return Name(1, 100, metadata={"example": "Analytical Engine"}, **options)


def description_field(**options: Any) -> fields.String:
    return fields.String(validate=validate.Length(max=500), **options)


def assignable_role_field(**options: Any) -> fields.String:
    return fields.String(validate=validate.OneOf(ROLES[1:]), **options)


class NewProject(Schema):
    name = project_name_field(required=True)
    description = description_field(load_default="")
    settings = JsonObject(load_default=dict)


class ProjectChange(Schema):
    name = project_name_field()
    description = description_field()
    settings = JsonObject()


class ProjectQuery(PageQuery):
    role = fields.String(load_default=None, validate=validate.OneOf(("owned", "collaborating")))
    q = fields.String(
        load_default=None,
        validate=validate.Length(max=100),
        metadata={"description": "text to search for in name and description"},
    )
    sort = fields.String(load_default="-updatedAt", validate=validate.OneOf(SORTS))


class Counts(Schema):
    workspaces = fields.Integer()
    collaborators = fields.Integer(metadata={"description": "number of members, including the owner"})


class Project(Schema):
    id = Id()
    name = fields.String(metadata={"example": "Analytical Engine"})
    description = fields.String()
    settings = fields.Dict()
    owner = RawJson(Person)
    role = fields.String(metadata={"enum": list(ROLES), "description": "role of the caller"})
    counts = RawJson(Counts)
    created_at = Timestamp()
    updated_at = Timestamp()


class Collaborator(Schema):
    id = Id()
    user = fields.Nested(Person)
    role = fields.String(metadata={"enum": list(ROLES)})
    joined_at = Timestamp()


class Workspace(Schema):
    """A workspace. Defined here, not in ``workspaces``, because a project contains its workspaces."""

    id = Id()
    project_id = Id()
    name = fields.String(metadata={"example": "Number crunching"})
    description = fields.String()
    meta = fields.Dict()
    created_at = Timestamp()
    updated_at = Timestamp()


class ProjectWithMembers(Project):
    """A single project, with the first 100 of its workspaces and of its members."""

    workspaces = fields.List(fields.Nested(Workspace))
    collaborators = fields.List(fields.Nested(Collaborator))


class NewCollaborator(Schema):
    email = AnyEmail(required=True)
    role = assignable_role_field(load_default="COLLABORATOR")


class RoleChange(Schema):
    role = assignable_role_field(required=True)


class Invitation(Schema):
    id = Id()
    project_id = Id()
    email = fields.String()
    role = fields.String(metadata={"enum": list(ROLES[1:])})
    expires_at = Timestamp()
    created_at = Timestamp()
    invited_by = fields.Nested(Person, allow_none=True)


class NewInvitation(Invitation):
    token = fields.String(metadata={"description": "returned only once"})


class CollaboratorOrInvitation(Schema):
    """The result of adding an address: a known user is added, an unknown address is invited."""

    collaborator = fields.Nested(Collaborator)
    invitation = fields.Nested(NewInvitation)


class Acceptance(Schema):
    token = token_field(required=True)


class Transfer(Schema):
    user_id = Id(required=True)


class Activity(Schema):
    id = fields.String()
    action = fields.String(metadata={"example": "workspace.created"})
    actor = fields.Nested(Person, allow_none=True)
    subject = fields.Dict()
    at = Timestamp()
