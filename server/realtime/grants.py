"""Resources that a socket can have access to, and the reasons why access ends."""

from typing import NamedTuple
from uuid import UUID


class ResourceRef(NamedTuple):
    """A resource that access is granted to: ``kind`` is "workspace" or "document"."""

    kind: str
    id: UUID


class Revocation(NamedTuple):
    """The reason why access ended: "removed", "left" or "deleted".

    ``actor`` and ``name`` are the user who ended it: None and empty if only a recheck in PostgreSQL found the end.
    """

    reason: str
    actor: UUID | None = None
    name: str = ""
