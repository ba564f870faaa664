"""Sessions: a device that is signed in, as a family of rotating refresh tokens (RFC 9700, section 4.14.2)."""

from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from uuid import UUID

from server.auth import store, tokens
from server.auth.blacklist import Blacklist
from server.errors import Unauthenticated
from server.postgres import Executor

GRACE_SECONDS = 10.0  # two honest requests with one token may race


@dataclass(frozen=True)
class Issuer:
    """What issuing tokens takes."""

    access_keys: tokens.Keys
    refresh_keys: tokens.Keys
    access_ttl: int
    refresh_ttl: int
    blacklist: Blacklist


@dataclass(frozen=True)
class Pair:
    access_token: str
    refresh_token: str
    expires_in: int


async def start(db: Executor, issuer: Issuer, *, user: UUID, user_agent: str, ip: str) -> Pair:
    """A new session; the longest unused one gives way where a user has too many."""
    now = datetime.now(UTC)
    refresh = tokens.new_secret()
    started = await store.start_session(
        db,
        user=user,
        token_hash=tokens.fingerprints(refresh, issuer.refresh_keys)[0],
        user_agent=user_agent[:512],
        ip=ip,
        expires_at=now + timedelta(seconds=issuer.refresh_ttl),
    )
    await issuer.blacklist.add(sessions=started["ended"])
    return _pair(issuer, user=user, session=started["id"], refresh=refresh, now=now)


async def refresh(db: Executor, issuer: Issuer, *, token: str) -> Pair:
    """Spend a refresh token for a new pair.

    Raises:
        Unauthenticated: ``refresh_reused`` where the token was spent before (its session ends), else
            ``unauthenticated``: it is unknown or expired, or its session has ended.
    """
    now = datetime.now(UTC)
    hashes = tokens.fingerprints(token, issuer.refresh_keys)
    fresh = tokens.new_secret()
    rotated = await store.rotate(
        db,
        hashes=hashes,
        new_hash=tokens.fingerprints(fresh, issuer.refresh_keys)[0],
        expires_at=now + timedelta(seconds=issuer.refresh_ttl),
        grace_seconds=GRACE_SECONDS,
    )
    if rotated is None:
        await _refuse(db, issuer, hashes)
    assert rotated is not None
    return _pair(issuer, user=rotated["user_id"], session=rotated["session_id"], refresh=fresh, now=now)


async def _refuse(db: Executor, issuer: Issuer, hashes: list[bytes]) -> None:
    reused = await store.end_session_of_token(db, hashes=hashes, user=None, spent_only=True)
    if reused is None:
        raise Unauthenticated("The refresh token is not valid")
    await issuer.blacklist.add(sessions=[reused])
    raise Unauthenticated("The refresh token was used before; sign in again", code="refresh_reused")


def _pair(issuer: Issuer, *, user: UUID, session: UUID, refresh: str, now: datetime) -> Pair:
    access = tokens.issue(user=user, session=session, keys=issuer.access_keys, now=now, ttl=issuer.access_ttl)
    return Pair(access_token=access, refresh_token=refresh, expires_in=issuer.access_ttl)
