"""Deny by default: a route that is not marked as public needs a user, and a route with a resource id needs a role."""

from collections.abc import Callable, Iterator

import aiohttp
import pytest
from aiohttp import web
from aiohttp.typedefs import Handler
from aiohttp_apispec import json_schema, querystring_schema
from pytest_aiohttp.plugin import AiohttpClient

from server.app import API, create_app
from server.fields import Id, Schema
from server.projects import access
from server.projects.access import Role, requires, resource_ids
from server.resources import connect
from server.rest.marks import is_public
from server.settings import Settings
from tests.actors import Actor

OPEN = {
    "/api/v1/auth/register",
    "/api/v1/auth/login",
    "/api/v1/auth/refresh",
    "/health",
    "/health/ready",
    "/metrics",  # has its own credentials
}


def routes() -> Iterator[web.RouteDef]:
    for table in API:
        for route in table:
            assert isinstance(route, web.RouteDef)
            yield route


def make_handler() -> Handler:
    async def handler(request: web.Request) -> web.Response:
        return web.Response()

    return handler


def test_only_listed_routes_are_public() -> None:
    assert {route.path for route in routes() if is_public(route.handler)} <= OPEN


async def test_route_without_marks_requires_a_signed_in_user(settings: Settings, aiohttp_client: AiohttpClient) -> None:
    async with connect(settings) as stores:
        app = create_app(settings, stores)
        app.router.add_get("/forgotten", make_handler())
        client = await aiohttp_client(app)
        response = await client.get("/forgotten")
        assert response.status == 401
        assert response.headers["WWW-Authenticate"] == 'Bearer error="invalid_token"'


@pytest.mark.parametrize("path", ["/projects/{projectId}", "/workspaces/{workspaceId}/x", "/documents/{documentId}"])
def test_route_with_a_resource_id_but_no_role_is_refused_at_start(path: str) -> None:
    handler = make_handler()
    with pytest.raises(RuntimeError, match="has no @requires"):
        assemble(web.get(path, handler))
    assemble(web.get(path, requires(Role.VIEWER)(handler)))


class Letter(Schema):
    project_id = Id()
    workspace_id = Id()


@pytest.mark.parametrize("declared", [json_schema, querystring_schema])
def test_route_with_a_resource_id_in_body_or_query_but_no_role_is_refused_at_start(declared: Callable) -> None:
    for marks in (
        lambda handler: handler,
        requires(Role.VIEWER, of=resource_ids("projectId")),  # lacks workspaceId
        requires(Role.VIEWER),  # checks the path, which contains no id
    ):
        with pytest.raises(RuntimeError, match="has no @requires"):
            assemble(web.post("/letters", marks(declared(Letter)(make_handler()))))
    both = requires(Role.VIEWER, of=resource_ids("workspaceId", "projectId"))
    assemble(web.post("/letters", both(declared(Letter)(make_handler()))))


def assemble(route: web.RouteDef) -> None:
    app = web.Application()
    app.router.add_routes([route])
    access.verify_routes(app.router.routes())


async def test_every_route_except_public_ones_rejects_anonymous_requests(
    server: str, http: aiohttp.ClientSession
) -> None:
    anonymous = Actor(http, server, "Anonymous")
    for route in routes():
        if route.path in OPEN:
            continue
        response = await anonymous.call(route.method, server_path(route.path))
        assert (response.status, response.code) == (401, "unauthenticated"), route


def server_path(path: str) -> str:
    """Return the path with an id for every parameter."""
    parts = ("00000000-0000-4000-8000-000000000000" if part.startswith("{") else part for part in path.split("/"))
    return "/".join(parts)
