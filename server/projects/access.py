"""Who may do what: the only place that decides.

``@requires`` marks the least role of a route or message; ``check`` answers, in one statement, whether the
thing exists for this user, which project it belongs to and what role they have there.
"""

import enum
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar
from uuid import UUID

from server.errors import Forbidden, NotFound
from server.postgres import Executor

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


def body(parameter: str) -> Body:
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


async def check(db: Executor, *, user: UUID, kind: Kind, id: UUID, role: Role) -> Access:  # noqa: A002
    """The access that this user has.

    Raises:
        NotFound: no such thing, or they are no member: which of the two is not revealed.
        Forbidden: they are a member without the needed role.
    """
    row = await db.fetchrow(_ACCESS, user, kind.value, id)
    if row is None:
        raise NotFound(f"No such {kind.value}")
    access = Access(project=row["project_id"], role=Role[row["role"]], revision=row["revision"])
    if access.role < role:
        raise Forbidden(f"This needs the role {role.name}; yours is {access.role.name}")
    return access


_ACCESS = """
SELECT m.project_id, m.role, p.revision
FROM members m JOIN projects p ON p.id = m.project_id
WHERE m.user_id = $1 AND m.project_id = CASE $2
    WHEN 'project' THEN $3::uuid
    WHEN 'workspace' THEN (SELECT project_id FROM workspaces WHERE id = $3)
END
"""
