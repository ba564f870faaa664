"""REST handlers of projects, their members, invitations and activity."""

from datetime import UTC, datetime
from functools import partial
from typing import Any
from uuid import UUID

from aiohttp import web
from aiohttp_apispec import docs, json_schema, querystring_schema, response_schema

from server import json
from server.auth import email_addresses
from server.errors import Conflict, NotFound, Unauthenticated
from server.fields import parse_id
from server.postgres import Database
from server.projects import (
    access,
    announcements,
    cache,
    invitations,
    invitations_store,
    members,
    members_store,
    schemas,
    store,
)
from server.projects.access import ACCESS, ResourceKind, Role, requires
from server.realtime.channels import Channels
from server.realtime.hub import REALTIME
from server.rest import responses
from server.rest.etags import (
    check_preconditions_without_etag,
    conditional_write_error,
    etag,
    expected_revisions,
    is_not_modified,
)
from server.rest.keys import BODY, DB, QUERY, RESOURCES, USER
from server.rest.marks import Idempotency, error_codes, idempotent
from server.rest.pagination import PageQuery, decode_cursor, page_schema, paginate

routes = web.RouteTableDef()
MAX_EMBEDDED_ITEMS = 100
PROJECT, PROJECT_WITH_MEMBERS = schemas.Project(), schemas.ProjectWithMembers()
COLLABORATOR, ACTIVITY = schemas.Collaborator(), schemas.Activity()
INVITATION, NEW_INVITATION = schemas.Invitation(), schemas.NewInvitation()


@routes.post("/api/v1/projects")
@docs(tags=["projects"], summary="Create a project; you own it")
@json_schema(schemas.NewProject)
@response_schema(schemas.Project, 201)
@idempotent(Idempotency.BY_TRANSACTION)
async def create_project(request: web.Request) -> web.Response:
    project = await store.create_project(request[DB], owner=request[USER].id, **request[BODY])
    if project is None:
        raise Unauthenticated("The account has been deleted")
    tag = etag(project["revision"], project["role"])
    return responses.created(f"/api/v1/projects/{project['id']}", PROJECT.dump(project), tag=tag)


@routes.get("/api/v1/projects")
@docs(tags=["projects"], summary="List your projects")
@querystring_schema(schemas.ProjectQuery)
@response_schema(page_schema(schemas.Project), 200)
async def list_projects(request: web.Request) -> web.Response:
    query = request[QUERY]
    order = f"projects by {query['sort']}"
    db = request.app[RESOURCES].db
    rows = await store.list_projects(
        db,
        user=request[USER].id,
        ownership=query["role"],
        search=query["q"],
        sort=query["sort"].lstrip("-"),
        descending=query["sort"].startswith("-"),
        limit=query["limit"],
        after=decode_cursor(query["cursor"], str, UUID, list_name=order),
    )
    listed, next_cursor = paginate(rows, query["limit"], "key", "id", list_name=order)
    return responses.page_of_items(await request.app[cache.PROJECT_LIST_CACHE].render(db, listed), next_cursor)


@routes.get("/api/v1/projects/{projectId}")
@docs(tags=["projects"], summary="Read a project, with its first 100 workspaces and collaborators")
@response_schema(schemas.ProjectWithMembers, 200)
@requires(Role.VIEWER)
async def read_project(request: web.Request) -> web.Response:
    stores, project, role = request.app[RESOURCES], request[ACCESS].project, request[ACCESS].role.name
    revision = request[ACCESS].revision
    tag = etag(revision, role)
    if is_not_modified(request, tag):
        return responses.with_etag(request, b"", tag=tag)
    body = await cache.get(stores.pipelines, project=project, revision=revision, role=role)
    if body is None:
        read = partial(store.read_project_with_members, project=project, limit=MAX_EMBEDDED_ITEMS)
        row = await stores.replicas.read(read, is_fresh=access.freshness_check(request[ACCESS]))
        if row is None:
            raise NotFound("Project not found")
        # The project may have changed since the access query: cache entry and ETag have the revision that was read.
        revision, body = row["revision"], json.dumps(PROJECT_WITH_MEMBERS.dump({**row, "role": role}))
        await cache.put(stores.pipelines, body, project=project, revision=revision, role=role)
    return responses.with_etag(request, body, tag=etag(revision, role))


@routes.patch("/api/v1/projects/{projectId}")
@docs(tags=["projects"], summary="Change a project")
@json_schema(schemas.ProjectChange)
@response_schema(schemas.Project, 200)
@requires(Role.COLLABORATOR)
async def change_project(request: web.Request) -> web.Response:
    role, changes = request[ACCESS].role.name, request[BODY]
    revisions = expected_revisions(request, role)
    changed = await store.change_project(
        request.app[RESOURCES].db,
        project=request[ACCESS].project,
        actor=request[USER].id,
        name=changes.get("name"),
        description=changes.get("description"),
        settings=changes.get("settings"),
        revisions=revisions,
    )
    if changed is None:
        raise conditional_write_error(revisions)
    await announcements.project_updated(*_event_arguments(request))
    return responses.entity(request, PROJECT, {**changed, "role": role}, role=role)


@routes.delete("/api/v1/projects/{projectId}")
@docs(tags=["projects"], summary="Delete a project with its contents")
@requires(Role.OWNER)
async def delete_project(request: web.Request) -> web.Response:
    revisions = expected_revisions(request, request[ACCESS].role.name)
    db, project, actor = request.app[RESOURCES].db, request[ACCESS].project, request[USER].id
    context = await store.read_event_context(db, project=project, actor=actor)
    if not await store.delete_project(db, project=project, revisions=revisions):
        raise conditional_write_error(revisions)
    await announcements.project_deleted(request.app[REALTIME].channels, context, actor=actor)
    return responses.no_content()


@routes.get("/api/v1/projects/{projectId}/activity")
@docs(tags=["projects"], summary="List the activity of a project, newest first")
@querystring_schema(PageQuery)
@response_schema(page_schema(schemas.Activity), 200)
@requires(Role.VIEWER)
async def list_activity(request: web.Request) -> web.Response:
    query = request[QUERY]
    (before,) = decode_cursor(query["cursor"], int, list_name="activity")
    rows = await store.list_activity(
        request.app[RESOURCES].db, project=request[ACCESS].project, limit=query["limit"], before=before
    )
    return responses.page(ACTIVITY, *paginate(rows, query["limit"], "id", list_name="activity"))


@routes.post("/api/v1/projects/{projectId}/transfer")
@docs(tags=["projects"], summary="Transfer a project: another member becomes the owner, you become a collaborator")
@json_schema(schemas.Transfer)
@response_schema(schemas.Project, 200)
@requires(Role.OWNER)
async def transfer_project(request: web.Request) -> web.Response:
    db, project, user = request.app[RESOURCES].db, request[ACCESS].project, request[USER].id
    to = request[BODY]["user_id"]
    await members.transfer(db, project=project, owner=user, to=to)
    await announcements.roles_changed(
        *_event_arguments(request), roles={user: Role.COLLABORATOR.name, to: Role.OWNER.name}
    )
    return await _project_response(request, project)


@routes.get("/api/v1/projects/{projectId}/collaborators")
@docs(tags=["collaborators"], summary="List the members, including the owner, in the order in which they joined")
@querystring_schema(PageQuery)
@response_schema(page_schema(schemas.Collaborator), 200)
@requires(Role.VIEWER)
async def list_collaborators(request: web.Request) -> web.Response:
    query = request[QUERY]
    read = partial(
        members_store.list_members,
        project=request[ACCESS].project,
        limit=query["limit"],
        after=decode_cursor(query["cursor"], datetime, UUID, list_name="collaborators"),
    )
    rows = await request.app[RESOURCES].replicas.read(read, is_fresh=access.freshness_check(request[ACCESS]))
    return responses.page(COLLABORATOR, *paginate(rows, query["limit"], "joined_at", "id", list_name="collaborators"))


@routes.post("/api/v1/projects/{projectId}/collaborators")
@docs(tags=["collaborators"], summary="Add a known user at once, or invite an unknown address")
@json_schema(schemas.NewCollaborator)
@response_schema(schemas.CollaboratorOrInvitation, 201)
@error_codes("already_collaborator", "idempotency_secret")
@idempotent(Idempotency.BY_TRANSACTION)
@requires(Role.OWNER)
async def add_collaborator(request: web.Request) -> web.Response:
    db, project, actor, body = request[DB], request[ACCESS].project, request[USER].id, request[BODY]
    user = await members_store.user_id_by_email_key(db, email_key=email_addresses.key(body["email"]))
    project_path = f"/api/v1/projects/{project}"
    if user is None:
        invitation = await invitations.invite(db, project=project, actor=actor, now=datetime.now(UTC), **body)
        response_body: dict[str, Any] = {"invitation": NEW_INVITATION.dump(invitation)}
        return responses.no_store(responses.created(f"{project_path}/invitations/{invitation['id']}", response_body))
    added = await members_store.add_member(db, project=project, actor=actor, user=user, role=body["role"])
    if added is None:
        raise NotFound("Project or user not found")
    if added["id"] is None:
        raise Conflict("The user is already a collaborator", code="already_collaborator")
    return responses.created(f"{project_path}/collaborators/{added['id']}", {"collaborator": COLLABORATOR.dump(added)})


@routes.patch("/api/v1/projects/{projectId}/collaborators/{collaboratorId}")
@docs(tags=["collaborators"], summary="Change a collaborator's role")
@json_schema(schemas.RoleChange)
@response_schema(schemas.Collaborator, 200)
@error_codes("owner_immutable")
@requires(Role.OWNER)
async def change_role(request: web.Request) -> web.Response:
    check_preconditions_without_etag(request)
    changed = await members.change_role(
        request.app[RESOURCES].db,
        project=request[ACCESS].project,
        actor=request[USER].id,
        member=_path_id(request, "collaboratorId"),
        role=request[BODY]["role"],
    )
    await announcements.roles_changed(*_event_arguments(request), roles={changed["user_id"]: changed["role"]})
    return responses.json(COLLABORATOR.dump(changed))


@routes.delete("/api/v1/projects/{projectId}/collaborators/{collaboratorId}")
@docs(tags=["collaborators"], summary="Remove a collaborator, or leave: every member may remove themselves")
@error_codes("owner_immutable")
@requires(Role.VIEWER)
async def remove_collaborator(request: web.Request) -> web.Response:
    check_preconditions_without_etag(request)
    removed = await members.remove(
        request.app[RESOURCES].db,
        access=request[ACCESS],
        actor=request[USER].id,
        member=_path_id(request, "collaboratorId"),
    )
    _, channels, project, actor = _event_arguments(request)
    await announcements.member_removed(channels, project, actor, user=removed["user_id"], name=removed["actor_name"])
    return responses.no_content()


@routes.get("/api/v1/projects/{projectId}/invitations")
@docs(tags=["invitations"], summary="List pending invitations to a project, newest first")
@querystring_schema(PageQuery)
@response_schema(page_schema(schemas.Invitation), 200)
@requires(Role.OWNER)
async def list_invitations(request: web.Request) -> web.Response:
    return await _invitation_page(request, project=request[ACCESS].project)


@routes.delete("/api/v1/projects/{projectId}/invitations/{invitationId}")
@docs(tags=["invitations"], summary="Withdraw an invitation")
@requires(Role.OWNER)
async def withdraw_invitation(request: web.Request) -> web.Response:
    check_preconditions_without_etag(request)
    withdrawn = await invitations_store.withdraw_invitation(
        request.app[RESOURCES].db,
        project=request[ACCESS].project,
        actor=request[USER].id,
        invitation=_path_id(request, "invitationId"),
    )
    if not withdrawn:
        raise NotFound("Invitation not found")
    return responses.no_content()


@routes.get("/api/v1/invitations")
@docs(tags=["invitations"], summary="List pending invitations to your address, newest first")
@querystring_schema(PageQuery)
@response_schema(page_schema(schemas.Invitation), 200)
async def list_my_invitations(request: web.Request) -> web.Response:
    return await _invitation_page(request, user=request[USER].id)


@routes.post("/api/v1/invitations/accept")
@docs(tags=["invitations"], summary="Join a project by the token of an invitation to your address")
@json_schema(schemas.Acceptance)
@response_schema(schemas.Project, 200)
@error_codes("not_found", "gone", "forbidden")
async def accept_invitation(request: web.Request) -> web.Response:
    project = await invitations.accept(request.app[RESOURCES].db, request[USER].id, request[BODY]["token"])
    return await _project_response(request, project)


def _event_arguments(request: web.Request) -> tuple[Database, Channels, UUID, UUID]:
    """Return the first arguments of every announcement."""
    return request.app[RESOURCES].db, request.app[REALTIME].channels, request[ACCESS].project, request[USER].id


async def _invitation_page(
    request: web.Request, *, project: UUID | None = None, user: UUID | None = None
) -> web.Response:
    query = request[QUERY]
    rows = await invitations_store.list_invitations(
        request.app[RESOURCES].db,
        project=project,
        user=user,
        limit=query["limit"],
        after=decode_cursor(query["cursor"], datetime, UUID, list_name="invitations"),
    )
    return responses.page(INVITATION, *paginate(rows, query["limit"], "created_at", "id", list_name="invitations"))


async def _project_response(request: web.Request, project: UUID) -> web.Response:
    """Return the project as the caller sees it after their role has changed."""
    db, user = request.app[RESOURCES].db, request[USER].id
    role = (await access.check(db, user=user, kind=ResourceKind.PROJECT, id=project, role=Role.VIEWER)).role.name
    row = await store.read_project(db, project=project)
    if row is None:
        raise NotFound("Project not found")
    return responses.entity(request, PROJECT, {**row, "role": role}, role=role)


def _path_id(request: web.Request, parameter: str) -> UUID:
    id = parse_id(request.match_info[parameter])
    if id is None:
        raise NotFound(f"{parameter.removesuffix('Id').capitalize()} not found")
    return id
