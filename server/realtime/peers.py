"""What sockets may be in, and why they must leave it."""

from typing import NamedTuple
from uuid import UUID


class Thing(NamedTuple):
    """What access is given to: ``kind`` is "workspace" or "document"."""

    kind: str
    id: UUID


class Revocation(NamedTuple):
    """Why access ended. Who did it is not known where only PostgreSQL told."""

    reason: str
    actor: UUID | None = None
    name: str = ""
