"""Closed by default: what is not marked as open needs a user, and what names a thing of ours needs a role."""

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
from server.projects.access import Role, named, requires
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
    "/metrics",  # has credentials of its own
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


def test_only_these_routes_are_open() -> None:
    assert {route.path for route in routes() if is_public(route.handler)} <= OPEN


async def test_a_route_that_marks_nothing_needs_a_signed_in_user(
    settings: Settings, aiohttp_client: AiohttpClient
) -> None:
    async with connect(settings) as stores:
        app = create_app(settings, stores)
        app.router.add_get("/forgotten", make_handler())
        client = await aiohttp_client(app)
        answer = await client.get("/forgotten")
        assert answer.status == 401
        assert answer.headers["WWW-Authenticate"] == 'Bearer error="invalid_token"'


@pytest.mark.parametrize("path", ["/projects/{projectId}", "/workspaces/{workspaceId}/x", "/documents/{documentId}"])
def test_a_route_that_names_a_thing_and_no_role_does_not_assemble(path: str) -> None:
    handler = make_handler()
    with pytest.raises(RuntimeError, match="has no @requires"):
        assemble(web.get(path, handler))
    assemble(web.get(path, requires(Role.VIEWER)(handler)))


class Letter(Schema):
    project_id = Id()
    workspace_id = Id()


@pytest.mark.parametrize("declared", [json_schema, querystring_schema])
def test_a_route_whose_body_or_query_names_a_thing_and_no_role_does_not_assemble(declared: Callable) -> None:
    for marks in (
        lambda handler: handler,
        requires(Role.VIEWER, of=named("projectId")),  # and the workspace?
        requires(Role.VIEWER),  # of the path, which names none
    ):
        with pytest.raises(RuntimeError, match="has no @requires"):
            assemble(web.post("/letters", marks(declared(Letter)(make_handler()))))
    both = requires(Role.VIEWER, of=named("workspaceId", "projectId"))
    assemble(web.post("/letters", both(declared(Letter)(make_handler()))))


def assemble(route: web.RouteDef) -> None:
    app = web.Application()
    app.router.add_routes([route])
    access.assemble(app.router.routes())


async def test_every_route_of_the_api_but_the_open_ones_refuses_the_anonymous(
    server: str, http: aiohttp.ClientSession
) -> None:
    nobody = Actor(http, server, "Nobody")
    for route in routes():
        if route.path in OPEN:
            continue
        answer = await nobody.call(route.method, server_path(route.path))
        assert (answer.status, answer.code) == (401, "unauthenticated"), route


def server_path(path: str) -> str:
    """With an id in every slot."""
    parts = ("00000000-0000-4000-8000-000000000000" if part.startswith("{") else part for part in path.split("/"))
    return "/".join(parts)
