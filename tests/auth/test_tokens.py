"""Access tokens and tickets: only unchanged tokens that we signed are accepted, and a ticket only once."""

import asyncio
import base64
import hashlib
import hmac
import json
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import uuid4

import aiohttp
import jwt
import pytest

from server.auth import tickets
from server.auth.tokens import KeyRing
from server.errors import Unauthenticated
from server.resources import redis_client
from server.settings import Settings
from tests.actors import Actor
from tests.conftest import MakeServer


def sign(claims: dict[str, Any], key: str, *, algorithm: str = "HS256", kid: str | None = None) -> str:
    return jwt.encode(claims, key, algorithm=algorithm, headers={"kid": kid or KeyRing.from_secrets(key).signing_id})


def part(raw: bytes) -> str:
    return base64.urlsafe_b64encode(raw).decode().rstrip("=")


def claims_of(token: str) -> dict[str, Any]:
    return jwt.decode(token, options={"verify_signature": False})


def same_signature(token: str) -> str:
    """Return another spelling of the same bytes: the last character has two unused bits."""
    alphabet = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_"
    return token[:-1] + alphabet[alphabet.index(token[-1]) + 1]


def signed_brackets(key: str) -> str:
    """Return a token whose header is nested brackets only, deeper than the parser's limit."""
    text = part(b"[" * 2000) + "." + part(b"{}")
    return text + "." + part(hmac.digest(key.encode(), text.encode(), hashlib.sha256))


def now() -> datetime:
    return datetime.now(UTC)


FORGERIES: dict[str, Callable[[str, str], str]] = {
    "another key": lambda token, _: sign(claims_of(token), "another key of more than 32 bytes, it is"),
    "another key under our key's id": lambda token, key: sign(
        claims_of(token), "another key of more than 32 bytes, it is", kid=KeyRing.from_secrets(key).signing_id
    ),
    "no key": lambda token, _: jwt.encode(claims_of(token), "", algorithm="none"),
    "no key, our id": lambda token, key: (
        part(json.dumps({"alg": "none", "kid": KeyRing.from_secrets(key).signing_id}).encode())
        + "."
        + token.split(".")[1]
        + "."
    ),
    "another algorithm": lambda token, key: sign(
        claims_of(token), key * 2, algorithm="HS512", kid=KeyRing.from_secrets(key).signing_id
    ),
    "another type": lambda token, key: sign(claims_of(token) | {"typ": "refresh"}, key),
    "a type before it": lambda token, key: sign(claims_of(token) | {"typ": "accept"}, key),
    "another audience": lambda token, key: sign(claims_of(token) | {"aud": "someone else"}, key),
    "several audiences": lambda token, key: sign(claims_of(token) | {"aud": [claims_of(token)["aud"]]}, key),
    "another issuer": lambda token, key: sign(claims_of(token) | {"iss": "someone else"}, key),
    "another user": lambda token, key: sign(claims_of(token) | {"sub": str(uuid4())}, key),
    "another session": lambda token, key: sign(claims_of(token) | {"sid": str(uuid4())}, key),
    "a session that is a number": lambda token, key: sign(claims_of(token) | {"sid": 7}, key),
    "a user that is none": lambda token, key: sign(claims_of(token) | {"sub": "' OR true --"}, key),
    "expired": lambda token, key: sign(claims_of(token) | {"exp": now() - timedelta(seconds=5)}, key),
    "expires in the year 300,000": lambda token, key: sign(claims_of(token) | {"exp": 10**13}, key),
    "issued before 1970": lambda token, key: sign(claims_of(token) | {"iat": -1}, key),
    "not yet valid": lambda token, key: sign(claims_of(token) | {"iat": now() + timedelta(hours=1)}, key),
    "trailing =": lambda token, _: token + "=",
    "trailing ==": lambda token, _: token + "==",
    "another spelling": lambda token, _: same_signature(token),
    "cut off": lambda token, _: token[:-4],
    "changed": lambda token, _: token[:-8] + token[-8:].swapcase(),
    "two parts": lambda token, _: token.rpartition(".")[0],
    "four parts": lambda token, _: token + "." + token.split(".")[2],
    "brackets": lambda _, key: signed_brackets(key),
    "long": lambda token, _: token + "A" * 4000,
    "not ASCII": lambda token, _: token[:-1] + "ä",
    "a word": lambda _, __: "null",
    "nothing": lambda _, __: "",
    **{
        f"without {claim}": lambda token, key, claim=claim: sign(
            {name: value for name, value in claims_of(token).items() if name != claim}, key
        )
        for claim in ("exp", "iat", "iss", "aud", "sub", "sid", "jti", "typ")
    },
}


@pytest.mark.parametrize("forgery", FORGERIES)
async def test_a_forged_token_opens_nothing(forgery: str, alice: Actor, settings: Settings) -> None:
    alice.access_token = FORGERIES[forgery](alice.access_token, settings.jwt_secret)
    refused = await alice.call("GET", "/auth/profile", headers={"Authorization": f"Bearer {alice.access_token}"})
    assert (refused.status, refused.code) == (401, "unauthenticated")
    assert refused.headers["WWW-Authenticate"] == 'Bearer error="invalid_token"'
    assert refused.headers["Content-Type"].startswith("application/problem+json")


async def test_unchanged_token_that_we_signed_is_accepted(alice: Actor, settings: Settings) -> None:
    """The forgeries above fail because of their flaw, not because of the way the test signs them."""
    alice.access_token = sign(claims_of(alice.access_token), settings.jwt_secret)
    assert (await alice.get("/auth/profile")).status == 200


async def test_token_expires_by_the_current_setting(alice: Actor, make_server: MakeServer, settings: Settings) -> None:
    """The blacklist entries of ended sessions expire by it, too."""
    shorter = alice.at(await make_server(access_token_ttl=settings.access_token_ttl // 3))
    issued = {"iat": int(now().timestamp()) - settings.access_token_ttl // 2}
    alice.access_token = shorter.access_token = sign(claims_of(alice.access_token) | issued, settings.jwt_secret)
    assert (await alice.get("/auth/profile")).status == 200
    assert (await shorter.get("/auth/profile")).status == 401


@pytest.mark.parametrize("header", ["", "Bearer", "Bearer ", "Basic YTpi", "Token {}", "{}", "Bearer {} {}"])
async def test_only_a_bearer_header_signs_in(header: str, alice: Actor) -> None:
    authorization = header.replace("{}", alice.access_token)
    alice.access_token = ""
    assert (await alice.get("/auth/profile", headers={"Authorization": authorization})).status == 401


async def test_the_scheme_may_be_written_in_any_case(alice: Actor) -> None:
    headers = {"Authorization": f"bearer {alice.access_token}"}
    assert (await alice.get("/auth/profile", headers=headers)).status == 200


async def test_a_refresh_token_is_no_access_token(alice: Actor) -> None:
    alice.access_token = alice.refresh_token
    assert (await alice.get("/auth/profile")).status == 401


async def test_secrets_can_be_rotated_without_signing_users_out(
    alice: Actor, make_server: MakeServer, settings: Settings
) -> None:
    changed = replace(
        settings,
        jwt_secret="a new secret of more than 32 bytes, it is",
        jwt_secret_previous=settings.jwt_secret,
        jwt_refresh_secret="a new refresh secret of more than 32 bytes",
        jwt_refresh_secret_previous=settings.jwt_refresh_secret,
    )
    after = alice.at(await make_server(**{name: getattr(changed, name) for name in SECRETS}))
    assert (await after.get("/auth/profile")).status == 200
    fresh = await after.post("/auth/refresh", {"refreshToken": alice.refresh_token})
    assert fresh.status == 200
    after.access_token = fresh["accessToken"]
    assert (await after.get("/auth/profile")).status == 200
    before = after.at(alice.base)  # a server that does not know the new secrets yet
    assert (await before.get("/auth/profile")).status == 401

    later = {name: getattr(changed, name) for name in SECRETS if not name.endswith("_previous")}
    finally_ = after.at(await make_server(**later))
    assert (await finally_.get("/auth/profile")).status == 200
    old = finally_.at(finally_.base)
    old.access_token = alice.access_token
    assert (await old.get("/auth/profile")).status == 401
    again = await finally_.post("/auth/refresh", {"refreshToken": fresh["refreshToken"]})
    assert again.status == 200


SECRETS = ("jwt_secret", "jwt_secret_previous", "jwt_refresh_secret", "jwt_refresh_secret_previous")


async def test_ticket_returns_its_user_once(alice: Actor, settings: Settings) -> None:
    issued = await alice.post("/auth/ws-ticket")
    assert (issued.status, issued["expiresIn"]) == (201, 30)
    assert issued.headers["Cache-Control"] == "no-store"
    redis = redis_client(settings.redis_url)
    try:
        user = await tickets.redeem(redis, ticket=issued["ticket"])
        claims = claims_of(alice.access_token)
        assert (str(user.id), str(user.session), user.token_id) == (alice.id, claims["sid"], claims["jti"])
        assert user.expires_at.timestamp() == claims["exp"]
        for ticket in (issued["ticket"], "never issued", "\udcff"):
            with pytest.raises(Unauthenticated):
                await tickets.redeem(redis, ticket=ticket)
    finally:
        await redis.aclose()


async def test_a_ticket_is_kept_as_a_hash_and_for_half_a_minute(alice: Actor, settings: Settings) -> None:
    ticket = (await alice.post("/auth/ws-ticket"))["ticket"]
    redis = redis_client(settings.redis_url)
    try:
        hashed = hashlib.sha256(ticket.encode()).hexdigest()
        keys = [key async for key in redis.scan_iter(match=f"*{hashed}*")]
        assert len(keys) == 1
        assert 25 <= await redis.ttl(keys[0]) <= 30
        assert [key async for key in redis.scan_iter(match=f"*{ticket}*")] == []
    finally:
        await redis.aclose()


async def test_a_ticket_does_not_outlive_its_access_token(
    make_server: MakeServer, http: aiohttp.ClientSession, settings: Settings
) -> None:
    alice = await Actor(http, await make_server(access_token_ttl=1), "Alice").register()
    ticket = (await alice.post("/auth/ws-ticket"))["ticket"]
    redis = redis_client(settings.redis_url)
    expires = claims_of(alice.access_token)["exp"]
    try:
        await asyncio.sleep(max(0.0, expires - datetime.now(UTC).timestamp()) + 0.05)
        with pytest.raises(Unauthenticated):
            await tickets.redeem(redis, ticket=ticket)
    finally:
        await redis.aclose()
