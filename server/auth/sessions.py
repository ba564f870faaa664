"""Sessions: a device that is signed in, as a family of rotating refresh tokens (RFC 9700, section 4.14.2)."""

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

GRACE_SECONDS = 10.0  # requests with one refresh token at once get the same successor
SALT_BYTES = 32
SPREAD_SECONDS = 0.75  # more than the blacklist takes; a silent Redis must not keep who logs out
KEPT_DAYS = 7  # of sessions that expired, for whoever asks what happened
NOTED_AGAIN = 5000  # sessions; where more ended lately, the rows decide for as long
LONGEST_USER_AGENT, LONGEST_ADDRESS = 512, 64


@dataclass(frozen=True)
class Issuer:
    """What issuing tokens takes, and whom to tell of sessions that ended."""

    access_keys: tokens.Keys
    verifier: tokens.Verifier  # of access tokens
    refresh_keys: tokens.Keys
    access_ttl: int
    refresh_ttl: int
    blacklist: Blacklist
    channels: Channels


@dataclass(frozen=True)
class Device:
    """What a request tells of where it comes from."""

    user_agent: str
    ip: str


@dataclass(frozen=True)
class Pair:
    access_token: str
    refresh_token: str
    expires_in: int


async def start(db: Executor, issuer: Issuer, *, user: UUID, password_hash: str, device: Device) -> Pair | None:
    """A new session; the longest unused one gives way where a user has too many.

    None where ``password_hash``, against which the password was verified, is the user's no longer.
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
    """Return a refresh token of a living session, be it spent: ``hash`` and ``session_id``."""
    hashes = tokens.fingerprints(token, issuer.refresh_keys)
    found = await asyncio.gather(*(store.living_token(db, hash=hash) for hash in hashes))
    return next(filter(None, found), None)


async def refresh(db: Executor, issuer: Issuer, *, token: str, found: Record | None) -> Pair:
    """Spend a refresh token for a new pair; used again at once it gives the same refresh token.

    ``found`` is what ``find_token`` has returned for it.

    Raises:
        Unauthenticated: ``refresh_reused``: the token was spent before, and its session has been ended;
            ``unauthenticated``: it is unknown or expired, its session has ended, or it was spent in this moment by a
            server that keeps no salt or has another key.
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
    """Log out: the session that asks ends, and that of the refresh token where it is another of theirs."""
    ended = {user.session}
    await store.end_session(db, user=user.id, session=user.session)
    if refresh_token is not None:
        hashes = tokens.fingerprints(refresh_token, issuer.refresh_keys)
        other = await store.end_session_of_token(db, hashes=hashes, user=user.id)
        ended |= {other} if other else set()
    await spread(issuer, sessions=ended, tokens=[user.token])


async def end_one(db: Executor, issuer: Issuer, *, user: UUID, session: UUID) -> None:
    """
    Raises:
        NotFound: the user has no such living session.
    """
    if not await store.end_session(db, user=user, session=session):
        raise NotFound("No such session")
    await spread(issuer, sessions=[session])


async def end_others(db: Executor, issuer: Issuer, *, user: User) -> None:
    await spread(issuer, sessions=await store.end_sessions(db, user=user.id, keep=user.session))


async def spread(issuer: Issuer, *, sessions: Collection[UUID], tokens: Collection[str] = ()) -> None:
    """Let it be known that these ended. The rows say so already: call it after the commit.

    Without Redis the sockets learn it when they are looked up.
    """
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(SPREAD_SECONDS):
            await asyncio.gather(
                issuer.blacklist.add(sessions=sessions, tokens=tokens), issuer.channels.revoke_sessions(sessions)
            )


async def note_again(db: Executor, issuer: Issuer) -> None:
    """For a process that starts: what ended lately, in case that whoever ended it could not note it, and died."""
    try:
        ended: list[UUID] | None = await store.recently_ended(db, seconds=issuer.access_ttl, most=NOTED_AGAIN)
    except Unavailable:
        ended = None
    if ended is None or len(ended) == NOTED_AGAIN:
        issuer.blacklist.distrust()
    else:
        await issuer.blacklist.add(sessions=ended)


async def forget_old(db: Executor) -> None:
    """The rows of sessions that expired long ago, piece by piece."""
    while await store.forget_old_sessions(db, keep_days=KEPT_DAYS):
        pass


async def forget_old_networks(db: Executor) -> None:
    """Forget the networks that are known no longer, piece by piece."""
    while await store.forget_old_networks(db):
        pass


async def erase_salts(db: Executor) -> None:
    """Erase the salts of refresh tokens whose successors may not be asked for again."""
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
    """Header values may hold bytes that are not UTF-8, as lone surrogates, which no store could keep."""
    return header.encode("utf-8", "replace").decode().replace("\0", "")
