"""Tokens: access tokens are JWTs (RFC 7519, HS256), refresh tokens are random and stored as a keyed hash."""

import base64
import hashlib
import hmac
import re
import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID, uuid4

import jwt

from server.errors import Unauthenticated

ISSUER = "collaborative-workspace"
AUDIENCE = "collaborative-workspace/api"
LEEWAY_SECONDS = 2
MAX_TOKEN_LENGTH = 4096
MAX_NUMERIC_DATE = 253_402_300_799  # the end of the year 9999
MAX_CACHED_TOKENS = 4096  # verified tokens cached in a process
_JWT_PATTERN = re.compile(r"[A-Za-z0-9_-]+\.[A-Za-z0-9_-]+\.([A-Za-z0-9_-]+)")
_TOKEN_ID_PATTERN = re.compile(r"[0-9a-f]{32}")
_REQUIRED_CLAIMS = ["exp", "iat", "iss", "aud", "sub", "sid", "jti", "typ"]


@dataclass(frozen=True)
class KeyRing:
    """Secrets by key id: one signs, all are accepted."""

    signing_id: str
    accepted: Mapping[str, str]

    @classmethod
    def from_secrets(cls, current: str, previous: str = "") -> "KeyRing":
        accepted = {_key_id(secret): secret for secret in (current, previous) if secret}
        return cls(signing_id=_key_id(current), accepted=accepted)


@dataclass(frozen=True)
class Claims:
    user: UUID
    session: UUID
    token_id: str
    expires_at: datetime


def issue(*, user: UUID, session: UUID, keys: KeyRing, now: datetime, ttl: int) -> str:
    """Return a signed access token that expires after ``ttl`` seconds."""
    claims = {
        "iss": ISSUER,
        "aud": AUDIENCE,
        "sub": str(user),
        "sid": str(session),
        "jti": uuid4().hex,
        "typ": "access",
        "iat": now,
        "exp": now + timedelta(seconds=ttl),
    }
    return jwt.encode(claims, keys.accepted[keys.signing_id], algorithm="HS256", headers={"kid": keys.signing_id})


def verify(token: str, *, keys: KeyRing, ttl: int) -> Claims:
    """Return the claims of an access token that we signed and that has not expired.

    A token expires after at most ``ttl`` seconds, even if it was issued for longer before the setting was changed,
    because the blacklist entry of its session expires then, too.

    Raises:
        Unauthenticated: the token is anything else.
    """
    try:
        if len(token) > MAX_TOKEN_LENGTH or not _is_canonical(token):
            raise jwt.InvalidTokenError("not in canonical form")
        key = keys.accepted.get(str(jwt.get_unverified_header(token).get("kid")))
        if key is None:
            raise jwt.InvalidKeyError("unknown key")
        claims = jwt.decode(
            token,
            key,
            algorithms=["HS256"],
            audience=AUDIENCE,
            issuer=ISSUER,
            leeway=LEEWAY_SECONDS,
            options={"require": _REQUIRED_CLAIMS, "strict_aud": True, "enforce_minimum_key_length": True},
        )
        if claims["typ"] != "access":
            raise jwt.InvalidTokenError("not an access token")
        return Claims(
            user=UUID(claims["sub"]),
            session=UUID(_require_text(claims["sid"])),
            token_id=_token_id(claims["jti"]),
            expires_at=min(
                _parse_numeric_date(claims["exp"]), _parse_numeric_date(claims["iat"]) + timedelta(seconds=ttl)
            ),
        )
    # RecursionError: a JSON header of nested brackets.
    except (jwt.PyJWTError, ValueError, TypeError, OverflowError, RecursionError):
        raise Unauthenticated("The access token is not valid") from None


class Verifier:
    """A cache of verified tokens: each signature is checked once, the expiry every time."""

    def __init__(self, keys: KeyRing, *, ttl: int) -> None:
        self._keys, self._ttl = keys, ttl
        self._cache: dict[str, Claims] = {}

    def verify(self, token: str, *, now: datetime) -> Claims:
        """Return the claims of a token. Raises Unauthenticated, as the function ``verify`` does."""
        claims = self._cache.get(token)
        if claims is None:
            claims = verify(token, keys=self._keys, ttl=self._ttl)
            if len(self._cache) >= MAX_CACHED_TOKENS:
                del self._cache[next(iter(self._cache))]  # the oldest
            self._cache[token] = claims
        if now >= claims.expires_at + timedelta(seconds=LEEWAY_SECONDS):
            del self._cache[token]
            raise Unauthenticated("The access token is not valid")
        return claims


def new_secret() -> str:
    """Return 256 random bits for a refresh token, an invitation or a ticket."""
    return secrets.token_urlsafe(32)


def keyed_hashes(secret: str, keys: KeyRing) -> list[bytes]:
    """Return the hash of a secret under every accepted key, the signing key's first. Only a hash is stored."""
    key_ids = [keys.signing_id, *(key_id for key_id in keys.accepted if key_id != keys.signing_id)]
    return [hmac.digest(keys.accepted[key_id].encode(), secret.encode(), hashlib.sha256) for key_id in key_ids]


def successor(token: str, *, salt: bytes, key: str) -> str:
    """Return the refresh token that follows this one. The salt is erased later; the key alone cannot derive it.

    It is the HMAC-SHA-256 (RFC 2104) of token and salt, in base64url without padding. Its length is that of
    ``new_secret``.
    """
    digest = hmac.digest(key.encode(), token.encode() + salt, hashlib.sha256)
    return base64.urlsafe_b64encode(digest).decode().rstrip("=")


def _parse_numeric_date(claim: Any) -> datetime:
    """Return the time of a NumericDate (RFC 7519, section 2) in whole seconds, as we issue them.

    Raises:
        ValueError: the claim is anything else, or not in the years 1970 to 9999.
    """
    if type(claim) is not int or not 0 <= claim <= MAX_NUMERIC_DATE:
        raise ValueError("not a NumericDate")
    return datetime.fromtimestamp(claim, UTC)


def _token_id(claim: Any) -> str:
    """Return the token id, as Redis keys contain it.

    Raises:
        ValueError: the claim is not an id that we issue.
    """
    if not _TOKEN_ID_PATTERN.fullmatch(_require_text(claim)):
        raise ValueError("not a token id")
    return str(claim)


def _require_text(claim: Any) -> str:
    if not isinstance(claim, str):
        raise TypeError("not a string")
    return claim


def _is_canonical(token: str) -> bool:
    """Return whether a token is spelled as we issue it.

    Base64 has several spellings of one signature (padding, unused last bits); only ours is accepted.
    """
    parts = _JWT_PATTERN.fullmatch(token)
    if parts is None:
        return False
    signature = parts.group(1)
    decoded = base64.urlsafe_b64decode(signature + "=" * (-len(signature) % 4))
    return base64.urlsafe_b64encode(decoded).decode().rstrip("=") == signature


def _key_id(secret: str) -> str:
    return hashlib.sha256(b"kid:" + secret.encode()).hexdigest()[:12]
