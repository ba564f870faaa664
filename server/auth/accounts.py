"""Changes of a whole account. Each runs in one transaction and is published to all processes after the commit."""

from collections.abc import Awaitable, Callable
from uuid import UUID

from asyncpg import Record

from server.auth import email_addresses, sessions, store
from server.auth.sessions import AuthContext, Device, IssuedTokens
from server.errors import Conflict, Unauthenticated
from server.postgres import Database, Executor, Revisions
from server.rest.etags import precondition_failed
from server.rest.keys import User

AcceptInvitation = Callable[[Executor, UUID, str], Awaitable[UUID]]
"""Accept the invitation with this token for this user; return the project. Raises NotFound, Gone or Forbidden.

Projects are a higher layer, so ``app.py`` passes it in.
"""


async def create(
    db: Database,
    auth_context: AuthContext,
    *,
    email: str,
    name: str,
    password_hash: str,
    device: Device,
    accept_invitation: AcceptInvitation,
    invitation_token: str | None,
) -> tuple[Record, IssuedTokens]:
    """Create a user and sign them in. With an invitation, account and membership are created together or not at all.

    Raises:
        Conflict: ``email_taken``.
        NotFound, Gone, Forbidden: the invitation is unknown, has expired, or was sent to another address.
    """

    async def register(transaction: Executor) -> tuple[Record, IssuedTokens]:
        key = email_addresses.key(email)
        user = await store.create_user(transaction, email=email, email_key=key, name=name, password_hash=password_hash)
        if user is None:
            raise Conflict("Email already registered", code="email_taken")
        if invitation_token is not None:
            await accept_invitation(transaction, user["id"], invitation_token)
        issued = await sessions.start(
            transaction, auth_context, user=user["id"], password_hash=password_hash, device=device
        )
        assert issued is not None
        return user, issued

    return await db.transact(register)


async def change_password(db: Database, auth_context: AuthContext, *, user: User, old_hash: str, new_hash: str) -> None:
    """Change the password and end every session of the user but the current one.

    Raises:
        Unauthenticated: ``invalid_credentials``: the password was changed since ``old_hash`` was read.
    """

    async def change(transaction: Executor) -> list[UUID]:
        if not await store.change_password(transaction, user=user.id, old_hash=old_hash, new_hash=new_hash):
            raise invalid_credentials()
        return await store.end_sessions(transaction, user=user.id, keep=user.session)

    await sessions.publish_revocation(auth_context, sessions=await db.transact(change))


async def delete(
    db: Database, auth_context: AuthContext, *, user: User, password_hash: str, revisions: Revisions | None
) -> None:
    """Delete the account with its sessions, and the projects that have no other member.

    Raises:
        Conflict: the user owns projects with other members.
        PreconditionFailed: with ``revisions``: the account has another revision, or the cases of Unauthenticated.
        Unauthenticated: without ``revisions``: the password has changed, or the account is deleted.
    """

    async def remove(transaction: Executor) -> list[UUID]:
        if not await store.lock_user(transaction, user=user.id, password_hash=password_hash, revisions=revisions):
            raise invalid_credentials() if revisions is None else precondition_failed()
        await store.lock_projects(transaction, user=user.id)
        # Read after the lock: a user may have joined while we waited for it.
        owned = await store.owned_projects(transaction, user=user.id)
        if any(project["others"] for project in owned):
            raise Conflict("You own projects with other members: transfer or delete them first")
        await store.delete_projects(transaction, projects=[project["id"] for project in owned])
        ended = await store.end_sessions(transaction, user=user.id, keep=None)
        await store.delete_user(transaction, user=user.id)
        return ended

    await sessions.publish_revocation(auth_context, sessions=await db.transact(remove))


def invalid_credentials() -> Unauthenticated:
    return Unauthenticated("Email or password is wrong", code="invalid_credentials")
