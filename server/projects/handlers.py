"""Projects over REST."""

from uuid import UUID

from aiohttp import web
from aiohttp_apispec import docs, json_schema, querystring_schema, response_schema

from server.errors import Conflict, NotFound
from server.projects import schemas, store
from server.projects.access import ACCESS, Role, requires
from server.rest import answers
from server.rest.etags import etag
from server.rest.keys import BODY, QUERY, RESOURCES, USER
from server.rest.marks import refuses
from server.rest.pages import keys_of, page, page_of

routes = web.RouteTableDef()
SHOWN_MEMBERS = 100
PROJECT, PROJECT_WITH_MEMBERS = schemas.Project(), schemas.ProjectWithMembers()
COLLABORATOR = schemas.Collaborator()


@routes.post("/api/v1/projects")
@docs(tags=["projects"], summary="Create a project; you own it")
@json_schema(schemas.NewProject)
@response_schema(schemas.Project, 201)
async def create_project(request: web.Request) -> web.Response:
    db = request.app[RESOURCES].db
    id = await store.create_project(db, owner=request[USER].id, **request[BODY])
    made = await store.read_project(db, project=id)
    assert made is not None
    shown = PROJECT.dump({**made, "role": Role.OWNER.name})
    return answers.created(f"/api/v1/projects/{id}", shown, tag=etag(made["revision"], Role.OWNER.name))


@routes.get("/api/v1/projects")
@docs(tags=["projects"], summary="Your projects")
@querystring_schema(schemas.ProjectQuery)
@response_schema(page_of(schemas.Project), 200)
async def list_projects(request: web.Request) -> web.Response:
    query = request[QUERY]
    rows = await store.list_projects(
        request.app[RESOURCES].db,
        user=request[USER].id,
        which=query["role"],
        search=query["q"],
        sort=query["sort"].lstrip("-"),
        descending=query["sort"].startswith("-"),
        limit=query["limit"],
        after=keys_of(query["cursor"], str, UUID),
    )
    return answers.page(PROJECT, *page(rows, query["limit"], "key", "id"))


@routes.get("/api/v1/projects/{projectId}")
@docs(tags=["projects"], summary="One project, with its first 100 workspaces and collaborators")
@response_schema(schemas.ProjectWithMembers, 200)
@requires(Role.VIEWER)
async def read_project(request: web.Request) -> web.Response:
    access = request[ACCESS]
    found = await store.read_project_with_members(request.app[RESOURCES].db, project=access.project, most=SHOWN_MEMBERS)
    if found is None:
        raise NotFound("No such project")
    return answers.entity(request, PROJECT_WITH_MEMBERS, {**found, "role": access.role.name}, role=access.role.name)


@routes.post("/api/v1/projects/{projectId}/collaborators")
@docs(tags=["collaborators"], summary="Add a known user")
@json_schema(schemas.NewCollaborator)
@response_schema(schemas.CollaboratorOrInvitation, 201)
@refuses("already_collaborator")
@requires(Role.OWNER)
async def add_collaborator(request: web.Request) -> web.Response:
    db, project, body = request.app[RESOURCES].db, request[ACCESS].project, request[BODY]
    user = await store.user_id_by_email(db, email=body["email"])
    if user is None:
        raise NotFound("Nobody has that address")
    added = await store.add_member(db, project=project, actor=request[USER].id, user=user, role=body["role"])
    if added is None:
        raise Conflict("They are a collaborator already", code="already_collaborator")
    location = f"/api/v1/projects/{project}/collaborators/{added['id']}"
    return answers.created(location, {"collaborator": COLLABORATOR.dump(added)})
