"""Sessions: a signed-in device, as a family of rotating refresh tokens (RFC 9700, section 4.14.2)."""

import asyncio
import contextlib
import secrets
from collections.abc import Collection
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from uuid import UUID

from asyncpg import Record

from server.auth import store, tokens
from server.auth.blacklist import Blacklist
from server.errors import NotFound, Unauthenticated, Unavailable
from server.postgres import Database, Executor
from server.ratelimit import client_subnet
from server.realtime.channels import Channels
from server.rest.keys import User

REUSE_GRACE_SECONDS = 10.0  # concurrent requests with one refresh token get the same successor
SALT_BYTES = 32
# More than the blacklist's own timeout; an unresponsive Redis must not delay a logout.
REVOCATION_TIMEOUT_SECONDS = 0.75
SESSION_RETENTION_DAYS = 7  # expired sessions stay in the database this long, for investigations
MAX_REBUILT_SESSIONS = 5000  # if more ended lately, PostgreSQL decides until their access tokens have expired
MAX_USER_AGENT_LENGTH, MAX_IP_LENGTH = 512, 64


@dataclass(frozen=True)
class AuthContext:
    """Keys and lifetimes of tokens, and the receivers of revocations."""

    access_keys: tokens.KeyRing
    verifier: tokens.Verifier  # of access tokens
    refresh_keys: tokens.KeyRing
    access_ttl: int
    refresh_ttl: int
    blacklist: Blacklist
    channels: Channels


@dataclass(frozen=True)
class Device:
    """The user agent and address of a request."""

    user_agent: str
    ip: str


@dataclass(frozen=True)
class IssuedTokens:
    access_token: str
    refresh_token: str
    expires_in: int


async def start(
    db: Executor, auth_context: AuthContext, *, user: UUID, password_hash: str, device: Device
) -> IssuedTokens | None:
    """Start a session; if the user has too many, the least recently used one ends.

    Returns None if ``password_hash``, against which the password was verified, is no longer the user's.
    """
    now = datetime.now(UTC)
    refresh = tokens.new_secret()
    started = await store.start_session(
        db,
        user=user,
        password_hash=password_hash,
        token_hash=tokens.keyed_hashes(refresh, auth_context.refresh_keys)[0],
        user_agent=_storable(device.user_agent)[:MAX_USER_AGENT_LENGTH],
        ip=_storable(device.ip)[:MAX_IP_LENGTH],
        network=client_subnet(device.ip),
        expires_at=now + timedelta(seconds=auth_context.refresh_ttl),
    )
    if started is None:
        return None
    await publish_revocation(auth_context, sessions=started["ended"])
    return _issue_tokens(auth_context, user=user, session=started["id"], refresh=refresh, now=now)


async def find_refresh_token(db: Database, auth_context: AuthContext, *, token: str) -> Record | None:
    """Return ``hash`` and ``session_id`` of a refresh token of an active session, even if it is spent."""
    hashes = tokens.keyed_hashes(token, auth_context.refresh_keys)
    rows = await asyncio.gather(*(store.find_active_token(db, hash=hash) for hash in hashes))
    return next(filter(None, rows), None)


async def refresh(db: Executor, auth_context: AuthContext, *, token: str, found: Record | None) -> IssuedTokens:
    """Spend a refresh token and issue new tokens; a concurrent request with it gets the same successor.

    ``found`` is the result of ``find_refresh_token``.

    Raises:
        Unauthenticated: ``refresh_reused``: the token was spent before, and its session has been ended;
            ``unauthenticated``: it is unknown or expired, its session has ended, or it was spent at the same moment by
            a server that stores no salt or has another key.
    """
    if found is None:
        raise await _refresh_error(db, auth_context, token)
    now, keys, salt = datetime.now(UTC), auth_context.refresh_keys, secrets.token_bytes(SALT_BYTES)
    successor = tokens.successor(token, salt=salt, key=keys.accepted[keys.signing_id])
    rotated = await store.rotate_refresh_token(
        db,
        hash=found["hash"],
        successor_hash=tokens.keyed_hashes(successor, keys)[0],
        salt=salt,
        key_id=keys.signing_id,
        expires_at=now + timedelta(seconds=auth_context.refresh_ttl),
        grace_seconds=REUSE_GRACE_SECONDS,
    )
    if rotated is None:
        raise await _refresh_error(db, auth_context, token)
    key = keys.accepted.get(rotated["key_id"])
    if key is None:
        raise Unauthenticated("The refresh token is not valid")
    successor = tokens.successor(token, salt=rotated["salt"], key=key)
    return _issue_tokens(
        auth_context, user=rotated["user_id"], session=rotated["session_id"], refresh=successor, now=now
    )


async def end_current(db: Executor, auth_context: AuthContext, *, user: User, refresh_token: str | None) -> None:
    """Log out: end the current session, and the session of the refresh token if it is another one of the user."""
    ended = {user.session}
    await store.end_session(db, user=user.id, session=user.session)
    if refresh_token is not None:
        hashes = tokens.keyed_hashes(refresh_token, auth_context.refresh_keys)
        other = await store.end_session_of_token(db, hashes=hashes, user=user.id)
        ended |= {other} if other else set()
    await publish_revocation(auth_context, sessions=ended, token_ids=[user.token_id])


async def end_one(db: Executor, auth_context: AuthContext, *, user: UUID, session: UUID) -> None:
    """End a session of the user.

    Raises:
        NotFound: the user has no such active session.
    """
    if not await store.end_session(db, user=user, session=session):
        raise NotFound("Session not found")
    await publish_revocation(auth_context, sessions=[session])


async def end_others(db: Executor, auth_context: AuthContext, *, user: User) -> None:
    await publish_revocation(auth_context, sessions=await store.end_sessions(db, user=user.id, keep=user.session))


async def publish_revocation(
    auth_context: AuthContext, *, sessions: Collection[UUID], token_ids: Collection[str] = ()
) -> None:
    """Publish that these sessions ended. PostgreSQL has it already: call this after the commit.

    During an outage of Redis, sockets are closed only when their sessions are rechecked.
    """
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(REVOCATION_TIMEOUT_SECONDS):
            await asyncio.gather(
                auth_context.blacklist.add(sessions=sessions, token_ids=token_ids),
                auth_context.channels.revoke_sessions(sessions),
            )


async def rebuild_blacklist(db: Executor, auth_context: AuthContext) -> None:
    """Add recently ended sessions to the blacklist at start: the process that ended them may have crashed before it."""
    try:
        ended: list[UUID] | None = await store.recently_ended_sessions(
            db, seconds=auth_context.access_ttl, limit=MAX_REBUILT_SESSIONS
        )
    except Unavailable:
        ended = None
    if ended is None or len(ended) == MAX_REBUILT_SESSIONS:
        auth_context.blacklist.mark_incomplete()
    else:
        await auth_context.blacklist.add(sessions=ended)


async def delete_expired_sessions(db: Executor) -> None:
    """Delete sessions that expired long ago, in batches."""
    while await store.delete_expired_sessions(db, retention_days=SESSION_RETENTION_DAYS):
        pass


async def delete_stale_networks(db: Executor) -> None:
    """Delete networks that no longer count as known, in batches."""
    while await store.delete_stale_networks(db):
        pass


async def erase_salts(db: Executor) -> None:
    """Erase the salts of refresh tokens whose grace period is over, in batches."""
    while await store.erase_salts(db, grace_seconds=REUSE_GRACE_SECONDS):
        pass


async def _refresh_error(db: Executor, auth_context: AuthContext, token: str) -> Unauthenticated:
    hashes = tokens.keyed_hashes(token, auth_context.refresh_keys)
    reused = await store.end_session_of_reused_token(db, hashes=hashes, grace_seconds=REUSE_GRACE_SECONDS)
    if reused is None:
        return Unauthenticated("The refresh token is not valid")
    await publish_revocation(auth_context, sessions=[reused])
    return Unauthenticated("The refresh token was used before; sign in again", code="refresh_reused")


def _issue_tokens(auth_context: AuthContext, *, user: UUID, session: UUID, refresh: str, now: datetime) -> IssuedTokens:
    access = tokens.issue(
        user=user, session=session, keys=auth_context.access_keys, now=now, ttl=auth_context.access_ttl
    )
    return IssuedTokens(access_token=access, refresh_token=refresh, expires_in=auth_context.access_ttl)


def _storable(header: str) -> str:
    """Replace lone surrogates (header bytes that are not UTF-8) and remove NUL: no store accepts them."""
    return header.encode("utf-8", "replace").decode().replace("\0", "")
