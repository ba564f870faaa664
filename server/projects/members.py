"""Changes of members: another role, removal, transfer of the project. Each project always has exactly one owner."""

from uuid import UUID

from asyncpg import Record

from server.errors import Conflict, Forbidden, NotFound, ServiceError, invalid_field
from server.postgres import Database, Executor
from server.projects import members_store
from server.projects.access import Access, Role


async def change_role(db: Executor, *, project: UUID, actor: UUID, member: UUID, role: str) -> Record:
    """Change the role of a member and return the member.

    Raises:
        NotFound: the member does not exist.
        Conflict: ``owner_immutable``.
    """
    changed = await members_store.change_role(db, project=project, actor=actor, member=member, role=role)
    if changed is None:
        raise await _member_error(db, project=project, member=member)
    return changed


async def remove(db: Executor, *, access: Access, actor: UUID, member: UUID) -> Record:
    """Remove a member, as the owner or as the member who leaves; return what ``members_store.remove_member`` does.

    Raises:
        Forbidden: the actor is neither of the two.
        NotFound: the member does not exist.
        Conflict: ``owner_immutable``.
    """
    row = await members_store.read_member(db, project=access.project, member=member)
    if row is None or row["user_id"] != actor:
        access.require(Role.OWNER)
    removed = await members_store.remove_member(db, project=access.project, actor=actor, member=member)
    if removed is None:
        raise await _member_error(db, project=access.project, member=member)
    return removed


async def transfer(db: Database, *, project: UUID, owner: UUID, to: UUID) -> None:
    """Make another member the owner; the old one becomes a collaborator.

    Raises:
        Forbidden: another user is the owner by now.
        ValidationFailed: that user is not a member, or already the owner.
    """
    if to == owner:
        raise invalid_field("userId", "Already the owner of this project.")

    async def swap(transaction: Executor) -> None:
        if not await members_store.demote_owner(transaction, project=project, owner=owner):
            raise Forbidden("You are no longer the owner of this project")
        if not await members_store.promote_to_owner(transaction, project=project, actor=owner, user=to):
            raise invalid_field("userId", "Not a member of this project.")

    await db.transact(swap)


async def _member_error(db: Executor, *, project: UUID, member: UUID) -> ServiceError:
    """Return the error for a member that was neither changed nor removed."""
    if await members_store.read_member(db, project=project, member=member) is None:
        return NotFound("Collaborator not found")
    return Conflict("The owner can be neither changed nor removed: transfer the project first", code="owner_immutable")
