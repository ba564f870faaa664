"""What may become of a member: another role, gone, the owner. Each project has exactly one owner, always."""

from uuid import UUID

from asyncpg import Record

from server.errors import Conflict, Forbidden, NotFound, ServiceError, invalid
from server.postgres import Database, Executor
from server.projects import members_store
from server.projects.access import Access, Role


async def change_role(db: Executor, *, project: UUID, actor: UUID, member: UUID, role: str) -> Record:
    """The member with the new role.

    Raises:
        NotFound: no such member.
        Conflict: ``owner_immutable``.
    """
    changed = await members_store.change_role(db, project=project, actor=actor, member=member, role=role)
    if changed is None:
        raise await _refusal(db, project=project, member=member)
    return changed


async def remove(db: Executor, *, access: Access, actor: UUID, member: UUID) -> Record:
    """Who was removed, see ``members_store.remove_member``: by the owner, or by themselves, which is to leave.

    Raises:
        Forbidden: neither.
        NotFound: no such member.
        Conflict: ``owner_immutable``.
    """
    found = await members_store.read_member(db, project=access.project, member=member)
    if found is None or found["user_id"] != actor:
        access.demand(Role.OWNER)
    removed = await members_store.remove_member(db, project=access.project, actor=actor, member=member)
    if removed is None:
        raise await _refusal(db, project=access.project, member=member)
    return removed


async def transfer(db: Database, *, project: UUID, owner: UUID, to: UUID) -> None:
    """Make another member the owner; the old one becomes a collaborator.

    Raises:
        Forbidden: somebody else is the owner by now.
        ValidationFailed: that user is no member, or the owner already.
    """
    if to == owner:
        raise invalid("userId", "The project is yours already.")

    async def swap(transaction: Executor) -> None:
        if not await members_store.step_down(transaction, project=project, owner=owner):
            raise Forbidden("You are not the owner any more")
        if not await members_store.step_up(transaction, project=project, actor=owner, user=to):
            raise invalid("userId", "Not a member of this project.")

    await db.transact(swap)


async def _refusal(db: Executor, *, project: UUID, member: UUID) -> ServiceError:
    """Why a member could be neither changed nor removed."""
    if await members_store.read_member(db, project=project, member=member) is None:
        return NotFound("No such collaborator")
    return Conflict("The owner can be neither changed nor removed; transfer the project", code="owner_immutable")
