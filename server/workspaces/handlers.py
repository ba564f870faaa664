"""REST handlers of workspaces."""

from datetime import datetime
from functools import partial
from uuid import UUID

from aiohttp import web
from aiohttp_apispec import docs, json_schema, querystring_schema, response_schema
from marshmallow import fields
from orjson import Fragment

from server.errors import NotFound
from server.projects import access, announcements
from server.projects.access import ACCESS, Role, requires, resource_ids
from server.realtime.events import AnyEvent
from server.realtime.history import parse_event_id
from server.realtime.hub import REALTIME
from server.resources import translate_store_errors
from server.rest import responses
from server.rest.etags import conditional_write_error, etag, expected_revisions
from server.rest.keys import BODY, DB, QUERY, RESOURCES, USER
from server.rest.marks import Idempotency, idempotent
from server.rest.pagination import PageQuery, decode_cursor, page_schema, paginate
from server.workspaces import schemas, store

routes = web.RouteTableDef()
WORKSPACE, ONLINE = schemas.Workspace(), schemas.UserHere()


@routes.post("/api/v1/workspaces")
@docs(tags=["workspaces"], summary="Create a workspace in a project")
@json_schema(schemas.NewWorkspace)
@response_schema(schemas.Workspace, 201)
@idempotent(Idempotency.BY_TRANSACTION)
@requires(Role.COLLABORATOR, of=resource_ids("projectId"))
async def create_workspace(request: web.Request) -> web.Response:
    body = request[BODY]
    workspace = await store.create_workspace(
        request[DB],
        project=body["project_id"],
        actor=request[USER].id,
        name=body["name"],
        description=body["description"],
        meta=body["meta"],
    )
    tag = etag(workspace["revision"], request[ACCESS].role.name)
    return responses.created(f"/api/v1/workspaces/{workspace['id']}", WORKSPACE.dump(workspace), tag=tag)


@routes.get("/api/v1/workspaces/project/{projectId}")
@docs(tags=["workspaces"], summary="List the workspaces of a project, oldest first")
@querystring_schema(PageQuery)
@response_schema(page_schema(schemas.Workspace), 200)
@requires(Role.VIEWER)
async def list_workspaces(request: web.Request) -> web.Response:
    query = request[QUERY]
    read = partial(
        store.list_workspaces,
        project=request[ACCESS].project,
        limit=query["limit"],
        after=decode_cursor(query["cursor"], datetime, UUID, list_name="workspaces"),
    )
    rows = await request.app[RESOURCES].replicas.read(read, is_fresh=access.freshness_check(request[ACCESS]))
    return responses.page(WORKSPACE, *paginate(rows, query["limit"], "created_at", "id", list_name="workspaces"))


@routes.get("/api/v1/workspaces/{workspaceId}")
@docs(tags=["workspaces"], summary="Read a workspace")
@response_schema(schemas.Workspace, 200)
@requires(Role.VIEWER)
async def read_workspace(request: web.Request) -> web.Response:
    row = await store.read_workspace(request.app[RESOURCES].db, workspace=_path_id(request))
    if row is None:
        raise NotFound("Workspace not found")
    return responses.entity(request, WORKSPACE, row, role=request[ACCESS].role.name)


@routes.get("/api/v1/workspaces/{workspaceId}/users")
@docs(tags=["workspaces"], summary="List the users who are online in a workspace, over all processes")
@querystring_schema(PageQuery)
@response_schema(page_schema(schemas.UserHere), 200)
@requires(Role.VIEWER)
async def list_online(request: web.Request) -> web.Response:
    query = request[QUERY]
    (after,) = decode_cursor(query["cursor"], UUID, list_name="online")
    with translate_store_errors():
        online = await request.app[REALTIME].presence.online(_path_id(request))
    rows = [vars(user) for user in online if after is None or user.user_id > after]
    return responses.page(ONLINE, *paginate(rows[: query["limit"] + 1], query["limit"], "user_id", list_name="online"))


@routes.get("/api/v1/workspaces/{workspaceId}/events")
@docs(tags=["workspaces"], summary="List the retained realtime events of a workspace, oldest first")
@querystring_schema(schemas.EventsQuery)
@response_schema(
    page_schema(AnyEvent, gap=fields.Boolean(metadata={"description": "`after` is no longer in the history"})),
    200,
)
@requires(Role.VIEWER)
async def list_events(request: web.Request) -> web.Response:
    query = request[QUERY]
    parameter = "after" if query["cursor"] is None else "cursor"  # the cursor of a page is its last event
    after = None if query[parameter] is None else parse_event_id(query[parameter], field=parameter)
    with translate_store_errors():
        replay = await request.app[REALTIME].channels.history.read(_path_id(request), after=after, limit=query["limit"])
    items = [Fragment(entry.event) for entry in replay.events]
    next_cursor = replay.events[-1].id if replay.more else None
    return responses.json({"items": items, "nextCursor": next_cursor, "gap": replay.gap})


@routes.patch("/api/v1/workspaces/{workspaceId}")
@docs(tags=["workspaces"], summary="Change a workspace")
@json_schema(schemas.WorkspaceChange)
@response_schema(schemas.Workspace, 200)
@requires(Role.COLLABORATOR)
async def change_workspace(request: web.Request) -> web.Response:
    role, changes, actor = request[ACCESS].role.name, request[BODY], request[USER].id
    revisions = expected_revisions(request, role)
    row = await store.change_workspace(
        request.app[RESOURCES].db,
        project=request[ACCESS].project,
        workspace=_path_id(request),
        actor=actor,
        name=changes.get("name"),
        description=changes.get("description"),
        meta=changes.get("meta"),
        revisions=revisions,
    )
    if row is None:
        raise conditional_write_error(revisions)
    channels = request.app[REALTIME].channels
    await channels.announce_committed("WORKSPACE_UPDATED", workspaces=[row["id"]], user=actor, name=row["actor_name"])
    return responses.entity(request, WORKSPACE, row, role=role)


@routes.delete("/api/v1/workspaces/{workspaceId}")
@docs(tags=["workspaces"], summary="Delete a workspace with its contents")
@requires(Role.COLLABORATOR)
async def delete_workspace(request: web.Request) -> web.Response:
    revisions = expected_revisions(request, request[ACCESS].role.name)
    actor, workspace = request[USER].id, _path_id(request)
    row = await store.delete_workspace(
        request.app[RESOURCES].db,
        project=request[ACCESS].project,
        workspace=workspace,
        actor=actor,
        revisions=revisions,
    )
    if row is None:
        raise conditional_write_error(revisions)
    channels = request.app[REALTIME].channels
    await announcements.workspaces_deleted(channels, [workspace], actor=actor, name=row["actor_name"])
    return responses.no_content()


def _path_id(request: web.Request) -> UUID:
    return UUID(request.match_info["workspaceId"])
