"""Access control: the only module that decides who may do what.

``@requires`` marks the minimum role of a route or message; ``check`` finds out, in one statement, whether the resource
exists for this user, which project it belongs to and what role the user has there.
"""

import asyncio
import enum
from collections.abc import Callable, Collection, Coroutine, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar
from uuid import UUID

from aiohttp import web
from asyncpg import Record

from server.errors import Forbidden, NotFound, invalid_field
from server.fields import parse_id
from server.postgres import Database, Executor
from server.realtime.connection import Connection
from server.realtime.grants import ResourceRef
from server.realtime.table import MessageDef
from server.replicas import FreshnessCheck
from server.rest.keys import BODY, QUERY, RESOURCES, USER

H = TypeVar("H", bound=Callable[..., Any])


class Role(enum.IntEnum):
    VIEWER = 1
    COLLABORATOR = 2
    OWNER = 3


class ResourceKind(enum.StrEnum):
    PROJECT = "project"
    WORKSPACE = "workspace"
    DOCUMENT = "document"

    @property
    def id_parameter(self) -> str:
        """The name of its id in paths and bodies."""
        return f"{self.value}Id"


@dataclass(frozen=True)
class Requirement:
    role: Role
    kinds: tuple[ResourceKind, ...]  # resources that a body, query or message names; empty: the id in the path


def resource_ids(*parameters: str) -> tuple[ResourceKind, ...]:
    """Return the kinds of resources that a body, query or message names by these fields, the most specific first."""
    return tuple(next(kind for kind in ResourceKind if kind.id_parameter == parameter) for parameter in parameters)


def requires(role: Role, *, of: tuple[ResourceKind, ...] = ()) -> Callable[[H], H]:
    """Mark a handler with the minimum role in the project of its resource.

    If ``of`` names several resources, the role is required for each, and all must belong to one project. Optional ones
    that are missing need no role.
    """

    def mark(handler: H) -> H:
        handler.__requires__ = Requirement(role, of)  # type: ignore[attr-defined]
        return handler

    return mark


def requirement_of(handler: Callable[..., Any]) -> Requirement | None:
    return getattr(handler, "__requires__", None)


@dataclass(frozen=True)
class Access:
    """The role of a member in the project that a resource belongs to."""

    project: UUID
    role: Role
    revision: int  # of the project

    def allows(self, role: Role) -> bool:
        """Return whether the member's role is ``role`` or a higher one."""
        return self.role >= role

    def require(self, role: Role) -> None:
        """Raise Forbidden unless the member's role is ``role`` or a higher one."""
        if not self.allows(role):
            raise Forbidden(f"This action requires the role {role.name}; your role is {self.role.name}")


async def check(db: Database, *, user: UUID, kind: ResourceKind, id: UUID, role: Role) -> Access:
    """Return the access of a user to a resource.

    Raises:
        NotFound: the resource does not exist, or the user is not a member: the two are not told apart.
        Forbidden: the user is a member without the required role.
    """
    row = await db.fetchrow_batched(_ACCESS_OF_USERS, user, kind.value, id)
    if row is None:
        raise NotFound(f"{kind.value.capitalize()} not found")
    access = _access(row)
    access.require(role)
    return access


def _access(row: Record) -> Access:
    return Access(project=row["project_id"], role=Role[row["role"]], revision=row["revision"])


def freshness_check(access: Access) -> FreshnessCheck:
    """Return a check whether a replica has the project at the revision of this access, or at a later one."""

    async def is_fresh(db: Executor) -> bool:
        return bool(await db.fetchval(_IS_FRESH, access.project, access.revision))

    return is_fresh


_IS_FRESH = "SELECT true FROM projects WHERE id = $1 AND revision >= $2"
# LIMIT forces one index lookup for each key: else a plan that was made while the tables were small keeps scanning them.
_ACCESS_OF_USERS = """
SELECT asked, found.*
FROM unnest($1::uuid[], $2::text[], $3::uuid[]) WITH ORDINALITY AS keys (person, kind, thing, asked),
LATERAL (
    SELECT m.project_id, m.role, (SELECT revision FROM projects p WHERE p.id = m.project_id) AS revision
    FROM members m WHERE m.user_id = person AND m.project_id = CASE kind
        WHEN 'project' THEN thing
        WHEN 'workspace' THEN (SELECT w.project_id FROM workspaces w WHERE w.id = thing)
        WHEN 'document' THEN (
            SELECT (SELECT w.project_id FROM workspaces w WHERE w.id = d.workspace_id)
            FROM documents d WHERE d.id = thing)
    END LIMIT 1
) AS found
"""


ACCESS = web.RequestKey("access", Access)


def verify_routes(routes: Iterable[web.AbstractRoute], *, exempt: Collection[str] = ()) -> None:
    """Reject a route that names a resource without ``@requires``, unless its path is ``exempt``.

    Raises:
        RuntimeError: at start, with the route's name.
    """
    for route in routes:
        path = route.resource.canonical if route.resource else ""
        if path in exempt:
            continue
        requirement = requirement_of(route.handler)
        in_path = [kind for kind in ResourceKind if f"{{{kind.id_parameter}}}" in path]
        if in_path and (requirement is None or requirement.kinds):
            raise RuntimeError(f"{route.method} {path} names a {in_path[0]} but has no @requires for it")
        for kind in _kinds_in_schemas(route.handler):
            if requirement is None or kind not in (requirement.kinds or in_path):
                raise RuntimeError(f"{route.method} {path} takes a {kind.id_parameter} but has no @requires for it")


def _kinds_in_schemas(handler: Callable[..., Any]) -> Iterator[ResourceKind]:
    for declared in getattr(handler, "__schemas__", ()):
        names = {field.data_key or name for name, field in declared["schema"].fields.items()}
        yield from (kind for kind in ResourceKind if kind.id_parameter in names)


def authorize_path(request: web.Request) -> Coroutine[Any, Any, None] | None:
    """Return the access check of the resource that the path names, for the middleware; None if it names none."""
    requirement = requirement_of(request.match_info.handler)
    if requirement is None or requirement.kinds:
        return None
    return _authorize_path(request, requirement)


async def _authorize_path(request: web.Request, requirement: Requirement) -> None:
    kind = next(kind for kind in ResourceKind if kind.id_parameter in request.match_info)
    id = parse_id(request.match_info[kind.id_parameter])
    if id is None:
        raise NotFound(f"{kind.value.capitalize()} not found")
    db = request.app[RESOURCES].db
    request[ACCESS] = await check(db, user=request[USER].id, kind=kind, id=id, role=requirement.role)


async def authorize_payload(request: web.Request) -> None:
    """Check the access to the resources that body or query name, for the middleware."""
    requirement = requirement_of(request.match_info.handler)
    if requirement is not None and requirement.kinds:
        values = request[BODY] if BODY in request else request.get(QUERY, {})
        granted = await check_payload(request.app[RESOURCES].db, requirement, user=request[USER].id, values=values)
        if granted is not None:
            request[ACCESS] = granted


async def authorize_message(connection: Connection, message: MessageDef, data: dict[str, Any]) -> None:
    """Check the access to the resources that a socket's message names, unless its connection has a grant for it."""
    requirement = requirement_of(message.handler)
    if requirement is None or not requirement.kinds:
        return
    resources = [
        ResourceRef(kind.value, id) for kind in requirement.kinds if (id := data.get(f"{kind.value}_id")) is not None
    ]
    cached: Access | None = connection.grants.get(resources[0]) if len(resources) == 1 else None
    if cached is None:
        db, user = connection.realtime.db, connection.user.id
        connection.access = await check_payload(db, requirement, user=user, values=data)
    else:
        cached.require(requirement.role)
        connection.access = cached


async def recheck(
    db: Executor, sessions: Sequence[UUID], grants: Sequence[tuple[UUID, ResourceRef]]
) -> tuple[set[UUID], dict[tuple[UUID, ResourceRef], Access]]:
    """Return the sessions that are still active, and the access of each pair of user and resource that still has it."""
    active, rows = await asyncio.gather(
        db.fetch(_ACTIVE_SESSIONS, list(sessions)),
        db.fetch(
            _ACCESS_OF_USERS,
            [user for user, _ in grants],
            [resource.kind for _, resource in grants],
            [resource.id for _, resource in grants],
        ),
    )
    return {row["id"] for row in active}, {grants[row["asked"] - 1]: _access(row) for row in rows}


_ACTIVE_SESSIONS = "SELECT id FROM sessions WHERE id = ANY ($1::uuid[]) AND ended_at IS NULL AND expires_at > now()"


async def check_payload(
    db: Database, requirement: Requirement, *, user: UUID, values: Mapping[str, Any]
) -> Access | None:
    """Return the access to the resources in ``values`` (a validated body, query or message); None if there are none.

    Raises:
        NotFound, Forbidden: as ``check`` does.
        ValidationFailed: they name resources of different projects.
    """
    granted: Access | None = None
    for kind in requirement.kinds:
        id = values.get(f"{kind.value}_id")
        if id is None:
            continue
        access = await check(db, user=user, kind=kind, id=id, role=requirement.role)
        if granted is not None and access.project != granted.project:
            raise invalid_field(kind.id_parameter, "Belongs to another project than the other ids.")
        granted = access
    return granted
