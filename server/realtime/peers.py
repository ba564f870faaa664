"""What the sockets of this process have in common, whatever they speak."""

from typing import Any, NamedTuple, Protocol
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


class Peer(Protocol):
    """A socket as ``Standing`` sees it: whose session may end, and whose access may change under it."""

    id: str
    user: Any  # rest.keys.User
    grants: dict[Thing, Any]
    """What is used now → projects.access.Access; None while it is in doubt, and must be asked for."""

    def close(self, code: int, reason: str = "") -> None:
        """End at once: out of everything, whatever still waits to be sent."""

    def retire(self, code: int, reason: str = "") -> None:
        """End as soon as the message that is being handled has been answered."""

    def lose(self, thing: Thing, why: Revocation) -> None:
        """The access to this thing has ended: leave it, and say so."""

    def announce_draining(self, frame: bytes) -> None:
        """The process is about to stop; ``frame`` is what JSON clients are told."""
