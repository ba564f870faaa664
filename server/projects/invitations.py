"""Invitations: a user who has the token and the invited address may join the project."""

import hashlib
from datetime import datetime, timedelta
from typing import Any
from uuid import UUID

from server.auth import email_addresses
from server.auth.tokens import new_secret
from server.errors import Forbidden, Gone, NotFound, invalid_field
from server.postgres import Executor
from server.projects import invitations_store

INVITATION_TTL = timedelta(days=7)
# After the expiry: for this long a client with the token receives "expired" (410) instead of "not found" (404).
INVITATION_RETENTION_DAYS = 30
MAX_DELETED_AT_ONCE = 1000


def token_hash(token: str) -> bytes:
    """Return the hash that is stored for a token: 256 random bits need neither salt nor key."""
    return hashlib.sha256(token.encode("utf-8", "replace")).digest()


async def invite(db: Executor, *, project: UUID, actor: UUID, email: str, role: str, now: datetime) -> dict[str, Any]:
    """Return the pending invitation of that address, with its ``token``; a second invitation renews it.

    Raises:
        ValidationFailed: no account can be created with that address.
        NotFound: the project is deleted.
    """
    try:
        email = email_addresses.parse(email)
    except email_addresses.InvalidAddressError as error:
        raise invalid_field("email", str(error)) from None
    token = new_secret()
    invitation = await invitations_store.invite(
        db,
        project=project,
        actor=actor,
        email=email,
        email_key=email_addresses.key(email),
        role=role,
        token_hash=token_hash(token),
        expires_at=now + INVITATION_TTL,
    )
    if invitation is None:
        raise NotFound("Project not found")
    return {**invitation, "token": token}


async def accept(db: Executor, user: UUID, token: str) -> UUID:
    """Use up the invitation with this token; return the project that the user is a member of now.

    Raises:
        NotFound, Gone, Forbidden: it is unknown or used, has expired, or was sent to another address.
    """
    hashed = token_hash(token)
    accepted = await invitations_store.accept_invitation(db, user=user, token_hash=hashed)
    if accepted is None:
        raise await _accept_error(db, hashed)
    project: UUID = accepted["project_id"]
    return project


async def delete_expired_invitations(db: Executor) -> None:
    while (
        await invitations_store.delete_expired_invitations(
            db, retention_days=INVITATION_RETENTION_DAYS, limit=MAX_DELETED_AT_ONCE
        )
        == MAX_DELETED_AT_ONCE
    ):
        pass


async def _accept_error(db: Executor, hashed: bytes) -> NotFound | Gone | Forbidden:
    state = await invitations_store.invitation_state(db, token_hash=hashed)
    if state is None:
        return NotFound("Invitation not found")
    if state["expired"]:
        return Gone("Invitation has expired")
    return Forbidden("The invitation was sent to another address")
