"""Who may do what: the only place that decides.

``@requires`` marks the least role of a route or message; ``check`` answers, in one statement, whether the
thing exists for this user, which project it belongs to and what role they have there.
"""

import enum
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, TypeVar
from uuid import UUID

from aiohttp import web

from server.errors import Forbidden, NotFound
from server.fields import parse_id
from server.postgres import Executor
from server.realtime.connection import Connection
from server.realtime.table import Message
from server.rest.keys import BODY, RESOURCES, USER

H = TypeVar("H", bound=Callable[..., Any])


class Role(enum.IntEnum):
    VIEWER = 1
    COLLABORATOR = 2
    OWNER = 3


class Kind(enum.StrEnum):
    PROJECT = "project"
    WORKSPACE = "workspace"
    DOCUMENT = "document"

    @property
    def parameter(self) -> str:
        """What its id is called in paths and bodies."""
        return f"{self.value}Id"


@dataclass(frozen=True)
class Body:
    """The thing is named by this field of the body."""

    kind: Kind


@dataclass(frozen=True)
class Requirement:
    role: Role
    of: Body | None  # None: the id in the path


def body_field(parameter: str) -> Body:
    return Body(next(kind for kind in Kind if kind.parameter == parameter))


def requires(role: Role, *, of: Body | None = None) -> Callable[[H], H]:
    """Mark a handler: the least role in the project of the thing that it is about."""

    def mark(handler: H) -> H:
        handler.__requires__ = Requirement(role, of)  # type: ignore[attr-defined]
        return handler

    return mark


def requirement_of(handler: Callable[..., Any]) -> Requirement | None:
    return getattr(handler, "__requires__", None)


@dataclass(frozen=True)
class Access:
    """What a member may see of the project that a thing belongs to."""

    project: UUID
    role: Role
    revision: int  # of the project

    def demand(self, role: Role) -> None:
        """Raises Forbidden unless the role is at least this one."""
        if self.role < role:
            raise Forbidden(f"This needs the role {role.name}; yours is {self.role.name}")


async def check(db: Executor, *, user: UUID, kind: Kind, id: UUID, role: Role) -> Access:
    """The access that this user has.

    Raises:
        NotFound: no such thing, or they are no member: which of the two is not revealed.
        Forbidden: they are a member without the needed role.
    """
    row = await db.fetchrow(_ACCESS, user, kind.value, id)
    if row is None:
        raise NotFound(f"No such {kind.value}")
    access = Access(project=row["project_id"], role=Role[row["role"]], revision=row["revision"])
    access.demand(role)
    return access


_ACCESS = """
SELECT m.project_id, m.role, p.revision
FROM members m JOIN projects p ON p.id = m.project_id
WHERE m.user_id = $1 AND m.project_id = CASE $2
    WHEN 'project' THEN $3::uuid
    WHEN 'workspace' THEN (SELECT project_id FROM workspaces WHERE id = $3)
END
"""


ACCESS = web.RequestKey("access", Access)


def assemble(routes: Iterable[web.AbstractRouteDef]) -> None:
    """Refuse a route that names a thing of ours and does not say who may use it.

    Raises:
        RuntimeError: at start, with the route's name.
    """
    for route in routes:
        if isinstance(route, web.RouteDef) and requirement_of(route.handler) is None and in_path(route.path):
            raise RuntimeError(f"{route.method} {route.path} names a {in_path(route.path)} but has no @requires")


def in_path(path: str) -> Kind | None:
    """The kind of thing that a route's path names."""
    return next((kind for kind in Kind if f"{{{kind.parameter}}}" in path), None)


async def authorize(request: web.Request) -> None:
    """Middleware's question: may this user use what the path names?"""
    requirement = requirement_of(request.match_info.handler)
    if requirement is None or requirement.of is not None:
        return
    kind = next(kind for kind in Kind if kind.parameter in request.match_info)
    id = parse_id(request.match_info[kind.parameter])
    if id is None:
        raise NotFound(f"No such {kind.value}")
    await _grant(request, kind, id, requirement.role)


async def authorize_body(request: web.Request) -> None:
    """Middleware's question: may this user use what the body names?"""
    requirement = requirement_of(request.match_info.handler)
    if requirement is not None and requirement.of is not None:
        kind = requirement.of.kind
        await _grant(request, kind, request[BODY][f"{kind.value}_id"], requirement.role)


async def authorize_message(connection: Connection, message: Message, data: dict[str, Any]) -> None:
    """The socket's question: may this user use what the message names?"""
    requirement = requirement_of(message.handler)
    if requirement is not None and requirement.of is not None:
        kind = requirement.of.kind
        connection.access = await check(
            connection.realtime.db,
            user=connection.user.id,
            kind=kind,
            id=data[f"{kind.value}_id"],
            role=requirement.role,
        )


async def _grant(request: web.Request, kind: Kind, id: UUID, role: Role) -> None:
    db = request.app[RESOURCES].db
    request[ACCESS] = await check(db, user=request[USER].id, kind=kind, id=id, role=role)
