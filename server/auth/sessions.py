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

GRACE_SECONDS = 10.0  # concurrent requests with one refresh token get the same successor
SALT_BYTES = 32
SPREAD_SECONDS = 0.75  # more than the blacklist's own timeout; an unresponsive Redis must not delay a logout
KEPT_DAYS = 7  # expired sessions stay in the database this long, for investigations
NOTED_AGAIN = 5000  # sessions; if more ended lately, PostgreSQL decides until their access tokens have expired
LONGEST_USER_AGENT, LONGEST_ADDRESS = 512, 64


@dataclass(frozen=True)
class Issuer:
    """Keys and lifetimes of tokens, and the receivers of revocations."""

    access_keys: tokens.Keys
    verifier: tokens.Verifier  # of access tokens
    refresh_keys: tokens.Keys
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
class Pair:
    access_token: str
    refresh_token: str
    expires_in: int


async def start(db: Executor, issuer: Issuer, *, user: UUID, password_hash: str, device: Device) -> Pair | None:
    """Start a session; if the user has too many, the one that is unused longest ends.

    Returns None if ``password_hash``, against which the password was verified, is no longer the user's.
    """
    now = datetime.now(UTC)
    refresh = tokens.new_secret()
    started = await store.start_session(
        db,
        user=user,
        password_hash=password_hash,
        token_hash=tokens.fingerprints(refresh, issuer.refresh_keys)[0],
        user_agent=_storable(device.user_agent)[:LONGEST_USER_AGENT],
        ip=_storable(device.ip)[:LONGEST_ADDRESS],
        network=client_subnet(device.ip),
        expires_at=now + timedelta(seconds=issuer.refresh_ttl),
    )
    if started is None:
        return None
    await spread(issuer, sessions=started["ended"])
    return _pair(issuer, user=user, session=started["id"], refresh=refresh, now=now)


async def find_token(db: Database, issuer: Issuer, *, token: str) -> Record | None:
    """Return ``hash`` and ``session_id`` of a refresh token of an active session, even if it is spent."""
    hashes = tokens.fingerprints(token, issuer.refresh_keys)
    rows = await asyncio.gather(*(store.living_token(db, hash=hash) for hash in hashes))
    return next(filter(None, rows), None)


async def refresh(db: Executor, issuer: Issuer, *, token: str, found: Record | None) -> Pair:
    """Spend a refresh token and issue new tokens; a concurrent reuse gets the same refresh token.

    ``found`` is the result of ``find_refresh_token``.

    Raises:
        Unauthenticated: ``refresh_reused``: the token was spent before, and its session has been ended;
            ``unauthenticated``: it is unknown or expired, its session has ended, or it was spent at the same moment by
            a server that stores no salt or has another key.
    """
    if found is None:
        raise await _refusal(db, issuer, token)
    now, keys, salt = datetime.now(UTC), issuer.refresh_keys, secrets.token_bytes(SALT_BYTES)
    successor = tokens.successor(token, salt=salt, key=keys.accepted[keys.signing_id])
    rotated = await store.rotate(
        db,
        hash=found["hash"],
        successor_hash=tokens.fingerprints(successor, keys)[0],
        salt=salt,
        key_id=keys.signing_id,
        expires_at=now + timedelta(seconds=issuer.refresh_ttl),
        grace_seconds=GRACE_SECONDS,
    )
    if rotated is None:
        raise await _refusal(db, issuer, token)
    key = keys.accepted.get(rotated["key_id"])
    if key is None:
        raise Unauthenticated("The refresh token is not valid")
    successor = tokens.successor(token, salt=rotated["salt"], key=key)
    return _pair(issuer, user=rotated["user_id"], session=rotated["session_id"], refresh=successor, now=now)


async def end_current(db: Executor, issuer: Issuer, *, user: User, refresh_token: str | None) -> None:
    """Log out: end the current session, and the session of the refresh token if it is another one of the user."""
    ended = {user.session}
    await store.end_session(db, user=user.id, session=user.session)
    if refresh_token is not None:
        hashes = tokens.fingerprints(refresh_token, issuer.refresh_keys)
        other = await store.end_session_of_token(db, hashes=hashes, user=user.id)
        ended |= {other} if other else set()
    await spread(issuer, sessions=ended, tokens=[user.token])


async def end_one(db: Executor, issuer: Issuer, *, user: UUID, session: UUID) -> None:
    """End a session of the user.

    Raises:
        NotFound: the user has no such active session.
    """
    if not await store.end_session(db, user=user, session=session):
        raise NotFound("Session not found")
    await spread(issuer, sessions=[session])


async def end_others(db: Executor, issuer: Issuer, *, user: User) -> None:
    await spread(issuer, sessions=await store.end_sessions(db, user=user.id, keep=user.session))


async def spread(issuer: Issuer, *, sessions: Collection[UUID], tokens: Collection[str] = ()) -> None:
    """Publish that these sessions ended. PostgreSQL has it already: call this after the commit.

    Without Redis, sockets find out when their access is rechecked.
    """
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(SPREAD_SECONDS):
            await asyncio.gather(
                issuer.blacklist.add(sessions=sessions, tokens=tokens), issuer.channels.revoke_sessions(sessions)
            )


async def note_again(db: Executor, issuer: Issuer) -> None:
    """Add recently ended sessions to the blacklist at start: the process that ended them may have crashed before it."""
    try:
        ended: list[UUID] | None = await store.recently_ended(db, seconds=issuer.access_ttl, most=NOTED_AGAIN)
    except Unavailable:
        ended = None
    if ended is None or len(ended) == NOTED_AGAIN:
        issuer.blacklist.distrust()
    else:
        await issuer.blacklist.add(sessions=ended)


async def forget_old(db: Executor) -> None:
    """Delete sessions that expired long ago, in batches."""
    while await store.forget_old_sessions(db, keep_days=KEPT_DAYS):
        pass


async def forget_old_networks(db: Executor) -> None:
    """Delete networks that no longer count as known, in batches."""
    while await store.forget_old_networks(db):
        pass


async def erase_salts(db: Executor) -> None:
    """Erase the salts of refresh tokens whose grace period is over, in batches."""
    while await store.erase_salts(db, grace_seconds=GRACE_SECONDS):
        pass


async def _refusal(db: Executor, issuer: Issuer, token: str) -> Unauthenticated:
    hashes = tokens.fingerprints(token, issuer.refresh_keys)
    reused = await store.end_session_of_spent_token(db, hashes=hashes, grace_seconds=GRACE_SECONDS)
    if reused is None:
        return Unauthenticated("The refresh token is not valid")
    await spread(issuer, sessions=[reused])
    return Unauthenticated("The refresh token was used before; sign in again", code="refresh_reused")


def _pair(issuer: Issuer, *, user: UUID, session: UUID, refresh: str, now: datetime) -> Pair:
    access = tokens.issue(user=user, session=session, keys=issuer.access_keys, now=now, ttl=issuer.access_ttl)
    return Pair(access_token=access, refresh_token=refresh, expires_in=issuer.access_ttl)


def _storable(header: str) -> str:
    """Replace lone surrogates (header bytes that are not UTF-8) and remove NUL: no store accepts them."""
    return header.encode("utf-8", "replace").decode().replace("\0", "")
