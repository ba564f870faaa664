"""Faults of sign-in that users saw: rate limits of offices, accounts and sessions; refresh tokens; hostile input."""

import asyncio
import base64
import hashlib
import hmac
import json
import secrets
import time
from collections import Counter
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from ipaddress import IPv4Network, IPv6Address, ip_network
from typing import Any
from uuid import UUID, uuid4

import aiohttp
import asyncpg
import limits
import pytest
from aiohttp.test_utils import make_mocked_request
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from prometheus_client import REGISTRY
from redis.asyncio import Redis
from structlog.testing import capture_logs

from server import migrations, ratelimit
from server.auth import sessions, store, tickets
from server.auth.passwords import Hasher
from server.auth.sessions import REUSE_GRACE_SECONDS
from server.auth.tokens import AUDIENCE, ISSUER, KeyRing, Verifier
from server.errors import Unauthenticated
from server.resources import redis_client
from server.rest import forwarded
from server.settings import Settings
from tests.actors import PASSWORD, Actor, Response
from tests.conftest import MakeServer
from tests.faults import FaultyNetwork, Mode
from tests.processes import Processes
from tests.test_ratelimit import from_address, quota_headers
from tests.timeouts import WAIT_TIMEOUT_SECONDS

BEHIND_PROXY = {"trusted_proxies": (ip_network("127.0.0.1"),)}
TEN, SIXTY = limits.parse("10/15minutes"), limits.parse("60/15minutes")
WRONG = "Wrong12345"
NO_DEADLINE = hypothesis_settings(deadline=None)


@pytest.fixture(autouse=True)
def _long_limiter_timeouts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Raise the limiter's timeouts.

    On a busy machine Redis may respond late. The local fallback of a process would then allow more requests.
    """
    monkeypatch.setattr(ratelimit, "STALL_TIMEOUT_SECONDS", 30.0)
    monkeypatch.setattr(ratelimit, "HIT_TIMEOUT_SECONDS", 30.0)


@pytest.fixture
async def db(database_url: str) -> AsyncIterator[asyncpg.Connection]:
    connection = await asyncpg.connect(database_url)
    yield connection
    await connection.close()


@pytest.fixture
async def office(make_server: MakeServer) -> str:
    """Start a server behind a proxy, with the default limits; return its address."""
    return await make_server(rate_limit_auth=TEN, rate_limit_refresh=SIXTY, rate_limit_account=TEN, **BEHIND_PROXY)


@pytest.fixture
async def guarded(make_server: MakeServer) -> str:
    """Start the same server without a limit per address, so that only the limit per account remains."""
    return await make_server(rate_limit_account=TEN, **BEHIND_PROXY)


@pytest.fixture
async def database_network(database_url: str) -> AsyncIterator[FaultyNetwork]:
    async with FaultyNetwork.start({"database_url": database_url}) as network:
        yield network


def fresh_address() -> str:
    """Return an address in a network that no other test uses, because the tests share their stores."""
    return str(IPv6Address(0x20010DB8 << 96 | secrets.randbits(32) << 64 | 1))


def user(http: aiohttp.ClientSession, base: str) -> Actor:
    return Actor(http, base, "Ada")


async def register(actor: Actor, *, address: str) -> Actor:
    body = {"email": actor.email, "password": actor.password, "name": actor.name}
    return actor._signed_in(await actor.post("/auth/register", body, headers=from_address(address)), 201)


async def log_in(actor: Actor, password: str = PASSWORD, *, address: str, email: str = "") -> Response:
    body = {"email": email or actor.email, "password": password}
    return await actor.post("/auth/login", body, headers=from_address(address) | {"Authorization": "none"})


async def refresh(actor: Actor, token: str = "", *, address: str = "") -> Response:
    headers = {"Authorization": "none"} | (from_address(address) if address else {})
    return await actor.post("/auth/refresh", {"refreshToken": token or actor.refresh_token}, headers=headers)


async def guess_passwords(actor: Actor, times: int, *, address: str = "") -> list[int]:
    """Log in with wrong passwords, each from another network unless one is given; return the statuses."""
    return [(await log_in(actor, WRONG, address=address or fresh_address())).status for _ in range(times)]


# One limit for sign-in and refresh signed out a whole office behind one address.


async def test_an_office_behind_one_address_is_not_signed_out(office: str, http: aiohttp.ClientSession) -> None:
    colleagues = [await register(user(http, office), address=fresh_address()) for _ in range(15)]
    address = fresh_address()
    attacker = user(http, office)
    assert (await guess_passwords(attacker, 11, address=address))[-1] == 429  # the quota of that address is used up
    answers = [await refresh(colleague, address=address) for colleague in colleagues]
    assert [answer.status for answer in answers] == [200] * 15
    assert {quota_headers(answer)[:2] for answer in answers} == {("refresh", 59)}
    assert {answer.headers["RateLimit-Policy"] for answer in answers} == {'"refresh";q=60;w=900'}


async def test_a_session_that_refreshes_too_often_is_refused_and_its_token_stays_valid(
    make_server: MakeServer, http: aiohttp.ClientSession
) -> None:
    base = await make_server(rate_limit_refresh=limits.parse("3/15minutes"), **BEHIND_PROXY)
    ada = await register(user(http, base), address=fresh_address())
    phone = await ada.at(base).log_in()
    for left in (2, 1, 0):
        answer = await refresh(ada)
        assert quota_headers(answer)[:2] == ("refresh", left)
        ada.refresh_token = answer["refreshToken"]
    for address in (fresh_address(), fresh_address()):
        refused = await refresh(ada, address=address)
        assert (refused.status, refused.code) == (429, "rate_limited")
        assert refused.headers["RateLimit-Policy"] == '"refresh";q=3;w=900'
        assert int(refused.headers["Retry-After"]) > 0
    assert (await refresh(phone)).status == 200  # another session of the same user
    assert (await refresh(ada.at(await make_server()))).status == 200


async def test_refreshes_without_an_active_session_count_as_sign_ins_of_their_address(
    office: str, http: aiohttp.ClientSession, db: asyncpg.Connection
) -> None:
    ended, expired, active = [await register(user(http, office), address=fresh_address()) for _ in range(3)]
    await ended.post("/auth/logout")
    await db.execute(
        """
        UPDATE refresh_tokens SET expires_at = now() WHERE session_id IN (SELECT id FROM sessions WHERE user_id = $1)
        """,
        expired.id,
    )
    address = fresh_address()
    headers = from_address(address)
    refusals = [
        await refresh(active, "unknown", address=address),
        await refresh(ended, address=address),
        await refresh(expired, address=address),
        await active.post("/auth/refresh", {}, headers=headers),
        await active.post("/auth/refresh", {"refreshToken": 7}, headers=headers),
        await active.post("/auth/refresh", data=b"{", headers=headers | {"Content-Type": "application/json"}),
        await active.post("/auth/refresh", data=b"x", headers=headers | {"Content-Type": "text/plain"}),
        *[await refresh(active, secrets.token_urlsafe(), address=address) for _ in range(5)],
    ]
    assert [answer.status for answer in refusals] == [401, 401, 401, 422, 422, 400, 415, 401, 401, 401, 429, 429]
    assert [quota_headers(answer)[:2] for answer in refusals] == [("auth", max(0, left)) for left in range(9, -3, -1)]
    assert int(refusals[-1].headers["Retry-After"]) > 0
    assert (await log_in(active, address=address)).status == 429
    assert (await refresh(active, address=address)).status == 200


async def test_refreshes_during_an_outage_of_postgresql_do_not_count_as_sign_ins(
    make_server: MakeServer, http: aiohttp.ClientSession, database_network: FaultyNetwork
) -> None:
    """Otherwise an outage would keep an office from signing in afterwards."""
    network, address = database_network, fresh_address()
    base = await make_server(**network.urls, rate_limit_auth=TEN, rate_limit_refresh=SIXTY, **BEHIND_PROXY)
    ada = await register(user(http, base), address=fresh_address())
    await network.stores["database_url"].set_mode(Mode.STOPPED)
    answers = [await refresh(ada, address=address) for _ in range(11)]
    assert {(answer.status, answer.code) for answer in answers} == {(503, "unavailable")}
    await network.stores["database_url"].set_mode(Mode.PASS)
    async with asyncio.timeout(WAIT_TIMEOUT_SECONDS):
        while (answer := await log_in(ada, address=address)).status == 503:
            await asyncio.sleep(0.05)
    assert answer.status == 200


# There was no rate limit per account.


async def test_password_guesses_from_many_networks_are_limited(
    make_server: MakeServer, http: aiohttp.ClientSession
) -> None:
    bases = [await make_server(rate_limit_account=TEN, **BEHIND_PROXY) for _ in range(2)]
    ada = await register(user(http, bases[0]), address=fresh_address())
    addresses = [fresh_address() for _ in range(20)]
    actors = [ada, ada.at(bases[1])]
    answers = await asyncio.gather(*(log_in(actors[n % 2], WRONG, address=addresses[n % 20]) for n in range(200)))
    assert Counter(answer.status for answer in answers) == {401: 10, 429: 190}
    refused = await log_in(ada, address=fresh_address())  # with the right password, which is not checked
    assert (refused.status, refused.code) == (429, "rate_limited")
    assert refused.headers["RateLimit-Policy"] == '"account";q=10;w=900'
    assert quota_headers(refused)[:2] == ("account", 0)
    assert int(refused.headers["Retry-After"]) == quota_headers(refused)[2]


async def test_spellings_of_one_address_are_one_account(guarded: str, http: aiohttp.ClientSession) -> None:
    ada = user(http, guarded)
    ada.email = f"kim-{uuid4().hex}@bücher.example"
    await register(ada, address=fresh_address())
    spellings = [ada.email.upper(), f" {ada.email}", ada.email.title(), ada.email.replace("bücher", "xn--bcher-kva")]
    answers = [
        await log_in(ada, WRONG, address=fresh_address(), email=spellings[n % len(spellings)]) for n in range(12)
    ]
    assert [answer.status for answer in answers] == [401] * 10 + [429] * 2


async def test_a_stranger_cannot_lock_out_the_owner_of_an_account(guarded: str, http: aiohttp.ClientSession) -> None:
    home, work = fresh_address(), "198.51.100.200"
    ada = await register(user(http, guarded), address=home)
    assert (await log_in(ada, address=work)).status == 200
    assert await guess_passwords(ada, 11) == [401] * 10 + [429]
    assert (await log_in(ada, address=fresh_address())).status == 429
    for known in (home, work, str(IPv6Address(home) + 7), f"::ffff:{work}"):
        assert (await log_in(ada, address=known)).status == 200, known
    assert await guess_passwords(ada, 11, address=home) == [401] * 10 + [429]  # each known network has its own limit
    assert (await log_in(ada, address=home)).status == 429
    assert (await log_in(ada, address=work)).status == 200


async def test_a_network_is_known_for_thirty_days_after_a_sign_in(
    guarded: str, http: aiohttp.ClientSession, db: asyncpg.Connection
) -> None:
    home = fresh_address()
    ada = await register(user(http, guarded), address=home)
    await guess_passwords(ada, 10)
    age = "UPDATE known_networks SET last_sign_in_at = now() - make_interval(hours => $2) WHERE user_id = $1"
    await db.execute(age, ada.id, 30 * 24 - 1)
    assert (await log_in(ada, address=home)).status == 200
    await db.execute(age, ada.id, 30 * 24 + 1)
    assert (await refresh(ada, address=home)).status == 200  # a refresh is no sign-in
    assert (await log_in(ada, address=home)).status == 429
    await sessions.delete_stale_networks(db)
    assert await networks_of(ada, db) == []


async def test_only_a_sign_in_makes_a_network_known(
    guarded: str, http: aiohttp.ClientSession, db: asyncpg.Connection
) -> None:
    home = fresh_address()
    ada = await register(user(http, guarded), address=home)
    assert await guess_passwords(ada, 1) == [401]
    assert (await refresh(ada, address=fresh_address())).status == 200
    assert (await ada.get("/auth/profile", headers=from_address(fresh_address()))).status == 200
    assert await networks_of(ada, db) == [str(ip_network((home, 64), strict=False))]


async def test_an_account_remembers_its_newest_networks_only(
    guarded: str, http: aiohttp.ClientSession, db: asyncpg.Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store, "MAX_KNOWN_NETWORKS", 3)
    addresses = [fresh_address() for _ in range(5)]
    ada = await register(user(http, guarded), address=addresses[0])
    for address in [*addresses, addresses[2]]:
        assert (await log_in(ada, address=address)).status == 200
    newest = {str(ip_network((address, 64), strict=False)) for address in addresses[2:]}
    assert set(await networks_of(ada, db)) == newest


async def test_sign_ins_that_forget_each_others_networks_do_not_deadlock(
    server: str, database_url: str, http: aiohttp.ClientSession, db: asyncpg.Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each of two concurrent sign-ins renews a network that the other one deletes."""
    monkeypatch.setattr(store, "MAX_KNOWN_NETWORKS", 1)
    ada = await user(http, server).register()
    connections = [await asyncpg.connect(database_url) for _ in range(2)]
    networks = [IPv4Network("192.0.2.1"), IPv4Network("192.0.2.2")]
    try:
        for _ in range(100):
            await db.execute(
                """
                INSERT INTO known_networks (user_id, network) SELECT $1, unnest($2::cidr[])
                ON CONFLICT (user_id, network) DO UPDATE SET last_sign_in_at = now()
                """,
                ada.id,
                networks,
            )
            await asyncio.gather(*(start_session(*sign_in, ada) for sign_in in zip(connections, networks, strict=True)))
    finally:
        for connection in connections:
            await connection.close()


async def start_session(connection: asyncpg.Connection, network: IPv4Network | None, actor: Actor) -> None:
    password_hash = await connection.fetchval("SELECT password_hash FROM users WHERE id = $1", actor.id)
    started = await store.start_session(
        connection,
        user=UUID(actor.id),
        password_hash=password_hash,
        token_hash=secrets.token_bytes(32),
        user_agent="",
        ip="",
        network=network,
        expires_at=datetime.now(UTC) + timedelta(days=1),
    )
    assert started


async def test_a_client_without_an_address_can_sign_in_without_a_known_network(
    server: str, http: aiohttp.ClientSession, db: asyncpg.Connection
) -> None:
    """A client of a Unix socket has no address."""
    assert ratelimit.client_subnet("unknown") is None
    ada = await user(http, server).register()
    known = await networks_of(ada, db)
    await start_session(db, None, ada)
    assert await networks_of(ada, db) == known
    account = await store.user_by_email(db, email=ada.email, email_key=ada.email.lower(), network=None)
    assert account
    assert account["is_known_network"] is False


async def networks_of(actor: Actor, db: asyncpg.Connection) -> list[str]:
    rows = await db.fetch("SELECT network::text FROM known_networks WHERE user_id = $1", actor.id)
    return [row["network"] for row in rows]


async def test_right_passwords_do_not_count(guarded: str, http: aiohttp.ClientSession) -> None:
    """They do not count from unknown networks either."""
    ada = await register(user(http, guarded), address=fresh_address())
    assert await guess_passwords(ada, 9) == [401] * 9
    for _ in range(12):
        assert (await log_in(ada, address=fresh_address())).status == 200
    assert await guess_passwords(ada, 2) == [401, 429]


async def test_a_refused_check_does_not_count(guarded: str, http: aiohttp.ClientSession) -> None:
    """Otherwise right passwords beyond the limit would lock out their owner, or their refund would allow guesses."""
    ada = await register(user(http, guarded), address=fresh_address())
    answers = await asyncio.gather(*(log_in(ada, address=fresh_address()) for _ in range(40)))
    assert {answer.status for answer in answers} <= {200, 429, 503}
    assert await guess_passwords(ada, 11) == [401] * 10 + [429]


async def test_unknown_addresses_behave_like_known_ones(guarded: str, http: aiohttp.ClientSession) -> None:
    known, unknown = await register(user(http, guarded), address=fresh_address()), user(http, guarded)
    behaviours: list[list[tuple[int, str, list[str]]]] = []
    for actor in (known, unknown):
        answers = [await log_in(actor, WRONG, address=fresh_address()) for _ in range(12)]
        behaviours.append([(answer.status, answer.code, sorted(answer.headers)) for answer in answers])
    assert behaviours[0] == behaviours[1]
    assert [status for status, _, _ in behaviours[0]] == [401] * 10 + [429] * 2


@pytest.mark.parametrize("known", [True, False])
async def test_a_password_beyond_the_limit_is_not_checked(
    known: bool, guarded: str, http: aiohttp.ClientSession, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So a refusal takes the same time for known and unknown addresses, and costs the server no hash."""
    ada = user(http, guarded)
    if known:
        await register(ada, address=fresh_address())
    verified_hashes: list[str | None] = []
    verify = Hasher.verify

    async def counting_verify(self: Hasher, password: str, hashed: str | None) -> bool:
        verified_hashes.append(hashed)
        return await verify(self, password, hashed)

    monkeypatch.setattr(Hasher, "verify", counting_verify)
    await guess_passwords(ada, 15)
    assert len(verified_hashes) == 10


async def test_keys_of_redis_contain_neither_addresses_nor_passwords(
    guarded: str, http: aiohttp.ClientSession, settings: Settings
) -> None:
    ada = await register(user(http, guarded), address=fresh_address())
    await guess_passwords(ada, 1)
    async with Redis.from_url(settings.redis_url) as redis:
        keys = [key.decode() async for key in redis.scan_iter(match="limit:*", count=1000)]
    assert any("/account/account:" in key for key in keys), keys
    assert [key for key in keys if ada.email.partition("@")[0] in key.lower()] == []


async def test_password_guesses_are_limited_while_redis_is_down(
    make_server: MakeServer, http: aiohttp.ClientSession, isolated_stores: dict[str, str]
) -> None:
    async with FaultyNetwork.start({"redis_url": isolated_stores["redis_url"]}) as network:
        base = await make_server(**isolated_stores | network.urls, rate_limit_account=TEN, **BEHIND_PROXY)
        home = fresh_address()
        ada = await register(user(http, base), address=home)
        await network.stores["redis_url"].set_mode(Mode.STOPPED)
        assert await guess_passwords(ada, 12) == [401] * 10 + [429] * 2
        assert (await log_in(ada, address=home)).status == 200


async def test_password_guesses_of_a_signed_in_session_are_limited_and_block_no_sign_in(
    guarded: str, http: aiohttp.ClientSession
) -> None:
    """A thief of an access token can neither guess passwords without a limit nor lock out the owner."""
    ada = await register(user(http, guarded), address=fresh_address())
    phone = await ada.at(guarded).log_in()
    change = {"currentPassword": WRONG, "newPassword": "Babbage1791"}
    guesses = [
        await (ada.delete("/auth/profile", {"password": WRONG}) if n % 2 else ada.post("/auth/password", change))
        for n in range(60)
    ]
    assert Counter(answer.status for answer in guesses) == {401: 10, 429: 50}
    assert guesses[-1].headers["RateLimit-Policy"] == '"account";q=10;w=900'
    assert int(guesses[-1].headers["Retry-After"]) > 0
    right = await ada.delete("/auth/profile", {"password": PASSWORD})
    assert (right.status, right.code) == (429, "rate_limited")
    assert (await log_in(ada, address=fresh_address())).status == 200  # also from an unknown network
    assert await guess_passwords(ada, 11) == [401] * 10 + [429]  # sign-ins have their own limit
    assert (await phone.delete("/auth/profile", {"password": PASSWORD})).status == 204


async def test_networks_of_active_sessions_are_known_after_the_migration(empty_database_url: str) -> None:
    migrations.apply(empty_database_url)
    connection = await asyncpg.connect(empty_database_url)
    try:
        await connection.execute((migrations.MIGRATIONS_DIR / "0008.sign_in.rollback.sql").read_text())
        ada = await connection.fetchval(
            "INSERT INTO users (email, name, password_hash) VALUES ('a@x.org', 'Ada', 'x') RETURNING id"
        )
        sign_ins = [
            ("203.0.113.7", 1), ("203.0.113.7", 3), ("2001:db8::7", 2), ("2001:DB8::8", 5), ("::1", 1),
            ("unknown", 1), ("", 1), ("fe80::1%eth0", 1), ("198.51.100.1", 31),
        ]  # fmt: skip
        for ip, days in sign_ins:
            await connection.execute(
                """
                INSERT INTO sessions (user_id, ip, created_at, expires_at)
                VALUES ($1, $2, now() - make_interval(days => $3), now())
                """,
                ada,
                ip,
                days,
            )
        await connection.execute((migrations.MIGRATIONS_DIR / "0008.sign_in.sql").read_text())
        rows = await connection.fetch(
            """
            SELECT network::text, (now() - last_sign_in_at)::text AS age FROM known_networks ORDER BY network
            """
        )
    finally:
        await connection.close()
    known = {row["network"]: int(row["age"].split()[0]) for row in rows}
    assert known == {"203.0.113.7/32": 1, "2001:db8::/64": 2, "::/64": 1}


# A refresh token that was spent twice within 10 s started two lasting sessions.


async def children_of(token: str, settings: Settings, db: asyncpg.Connection) -> list[asyncpg.Record]:
    return await db.fetch("SELECT * FROM refresh_tokens WHERE parent = $1", stored_hash(token, settings))


def stored_hash(token: str, settings: Settings) -> bytes:
    """Return the stored hash of a refresh token."""
    return hmac.digest(settings.jwt_refresh_secret.encode(), token.encode(), hashlib.sha256)


async def row_of(token: str, settings: Settings, db: asyncpg.Connection) -> asyncpg.Record:
    row = await db.fetchrow("SELECT * FROM refresh_tokens WHERE hash = $1", stored_hash(token, settings))
    assert row is not None
    return row


async def spend_earlier(token: str, settings: Settings, db: asyncpg.Connection, *, seconds: float) -> None:
    await db.execute(
        "UPDATE refresh_tokens SET spent_at = spent_at - make_interval(secs => $2) WHERE hash = $1",
        stored_hash(token, settings),
        seconds,
    )


async def test_a_token_used_fifty_times_at_once_has_one_successor(
    processes: Processes, http: aiohttp.ClientSession, settings: Settings, db: asyncpg.Connection
) -> None:
    servers = [processes.server(), processes.server()]
    ada = await user(http, servers[0].base).register()
    tabs = [ada, ada.at(servers[1].base)]
    answers = await asyncio.gather(*(refresh(tabs[n % 2]) for n in range(50)))
    assert {answer.status for answer in answers} <= {200, 503}  # a busy machine may respond with 503
    successes = [answer for answer in answers if answer.status == 200]
    assert len(successes) >= 25
    assert len({answer["refreshToken"] for answer in successes}) == 1
    assert len({answer["accessToken"] for answer in successes}) == len(successes)
    children = await children_of(ada.refresh_token, settings, db)
    assert [child["hash"] for child in children] == [stored_hash(successes[0]["refreshToken"], settings)]


async def test_a_thief_and_the_owner_of_a_token_cannot_both_stay_signed_in(
    server: str, http: aiohttp.ClientSession
) -> None:
    owner = await user(http, server).register()
    thief = owner.at(server)
    for actor in (owner, thief):  # within the 10 s
        actor.refresh_token = (await refresh(actor))["refreshToken"]
    assert thief.refresh_token == owner.refresh_token
    spent = owner.refresh_token
    owner.refresh_token = (await refresh(owner))["refreshToken"]
    assert (await refresh(owner)).status == 200  # uses the successor of the thief's token
    reused = await refresh(thief, spent)
    assert (reused.status, reused.code) == (401, "refresh_reused")
    assert (await refresh(owner)).status == 401  # the whole family ends
    assert (await owner.get("/auth/profile")).status == 401


async def test_a_lost_response_of_a_refresh_can_be_requested_again(
    server: str, http: aiohttp.ClientSession, settings: Settings, db: asyncpg.Connection
) -> None:
    ada = await user(http, server).register()
    first = await refresh(ada)
    await spend_earlier(ada.refresh_token, settings, db, seconds=REUSE_GRACE_SECONDS - 3)
    repeated = await refresh(ada)
    assert (repeated.status, repeated["refreshToken"]) == (200, first["refreshToken"])
    assert repeated["expiresIn"] == first["expiresIn"]
    ada.access_token = repeated["accessToken"]
    assert (await ada.get("/auth/profile")).status == 200


async def test_a_token_used_again_after_ten_seconds_ends_its_session(
    server: str, http: aiohttp.ClientSession, settings: Settings, db: asyncpg.Connection
) -> None:
    ada = await user(http, server).register()
    fresh = await refresh(ada)
    await spend_earlier(ada.refresh_token, settings, db, seconds=REUSE_GRACE_SECONDS)
    reused = await refresh(ada)
    assert (reused.status, reused.code) == (401, "refresh_reused")
    assert (await refresh(ada, fresh["refreshToken"])).status == 401


async def test_a_reused_token_whose_successor_was_used_ends_its_session_within_ten_seconds_too(
    server: str, http: aiohttp.ClientSession
) -> None:
    ada = await user(http, server).register()
    fresh = await refresh(ada)
    last = await refresh(ada, fresh["refreshToken"])
    reused = await refresh(ada)
    assert (reused.status, reused.code) == (401, "refresh_reused")
    assert (await refresh(ada, last["refreshToken"])).status == 401


def successor_of(token: str, salt: bytes, key: str) -> str:
    return (
        base64.urlsafe_b64encode(hmac.digest(key.encode(), token.encode() + salt, hashlib.sha256)).decode().strip("=")
    )


async def test_a_leaked_key_does_not_derive_later_tokens_from_an_old_one(
    server: str, http: aiohttp.ClientSession, settings: Settings, db: asyncpg.Connection
) -> None:
    """The salt is stored for repeated uses of its token, and erased when the successor is used."""
    ada = await user(http, server).register()
    token = ada.refresh_token
    for _ in range(3):
        successor = (await refresh(ada, token))["refreshToken"]
        row = await row_of(token, settings, db)
        assert (len(row["salt"]), row["key_id"]) == (32, KeyRing.from_secrets(settings.jwt_refresh_secret).signing_id)
        assert successor == successor_of(token, row["salt"], settings.jwt_refresh_secret)
        assert (await refresh(ada, successor)).status == 200
        row = await row_of(token, settings, db)
        assert (row["salt"], row["key_id"]) == (None, None)
        token = (await refresh(ada, successor))["refreshToken"]


async def test_salts_are_erased_after_ten_seconds(
    server: str, http: aiohttp.ClientSession, settings: Settings, db: asyncpg.Connection
) -> None:
    ada, bob = await user(http, server).register(), await user(http, server).register()
    for actor in (ada, bob):
        await refresh(actor)
    await spend_earlier(ada.refresh_token, settings, db, seconds=REUSE_GRACE_SECONDS)
    async with asyncio.timeout(WAIT_TIMEOUT_SECONDS):
        while (await row_of(ada.refresh_token, settings, db))["salt"] is not None:
            await asyncio.sleep(0.05)
    assert (await row_of(ada.refresh_token, settings, db))["key_id"] is None


async def test_housekeeping_keeps_tokens_that_may_be_requested_again(
    server: str, http: aiohttp.ClientSession, settings: Settings, db: asyncpg.Connection
) -> None:
    ada = await user(http, server).register()
    first = await refresh(ada)
    await spend_earlier(ada.refresh_token, settings, db, seconds=-3600)
    await sessions.erase_salts(db)
    assert (await refresh(ada))["refreshToken"] == first["refreshToken"]


async def test_a_token_that_an_older_version_has_just_spent_is_refused_and_its_session_continues(
    server: str, http: aiohttp.ClientSession, settings: Settings, db: asyncpg.Connection
) -> None:
    ada = await user(http, server).register()
    fresh = await refresh(ada)
    await db.execute(
        "UPDATE refresh_tokens SET salt = NULL, key_id = NULL WHERE hash = $1", stored_hash(ada.refresh_token, settings)
    )
    raced = await refresh(ada)
    assert (raced.status, raced.code) == (401, "unauthenticated")
    assert len(await children_of(ada.refresh_token, settings, db)) == 1
    assert (await ada.get("/auth/profile")).status == 200
    await spend_earlier(ada.refresh_token, settings, db, seconds=REUSE_GRACE_SECONDS)
    assert (await refresh(ada)).code == "refresh_reused"
    assert (await refresh(ada, fresh["refreshToken"])).status == 401


async def test_a_race_during_a_rotation_of_the_secrets_logs_no_user_out(
    make_server: MakeServer, http: aiohttp.ClientSession, settings: Settings
) -> None:
    """The row names the key that the first server used; the second server signs with another key."""
    old, new = settings.jwt_refresh_secret, secrets.token_urlsafe(48)
    accepting = await make_server(jwt_refresh_secret=old, jwt_refresh_secret_previous=new)
    signing = await make_server(jwt_refresh_secret=new, jwt_refresh_secret_previous=old)
    ada = await user(http, accepting).register()
    there = ada.at(signing)
    for first, second in ((ada, there), (there, ada)):
        one, other = await refresh(first), await refresh(second)
        assert (one.status, other.status) == (200, 200)
        assert one["refreshToken"] == other["refreshToken"]
        ada.refresh_token = there.refresh_token = one["refreshToken"]
    outdated = ada.at(await make_server())  # has not been restarted with the new key
    fresh = await refresh(ada)  # the token's hash is the new key's
    assert fresh.status == 200
    refused = await refresh(outdated)
    assert (refused.status, refused.code) == (401, "unauthenticated")
    assert (await refresh(ada, fresh["refreshToken"])).status == 200


async def test_a_server_without_the_key_of_the_first_server_refuses_and_the_session_continues(
    make_server: MakeServer, http: aiohttp.ClientSession, settings: Settings
) -> None:
    new = secrets.token_urlsafe(48)
    signing = await make_server(jwt_refresh_secret=new, jwt_refresh_secret_previous=settings.jwt_refresh_secret)
    ada = await user(http, await make_server()).register()
    fresh = await refresh(ada.at(signing))
    refused = await refresh(ada)
    assert (refused.status, refused.code) == (401, "unauthenticated")
    assert (await refresh(ada.at(signing), fresh["refreshToken"])).status == 200


# An entry ip:port of X-Forwarded-For put all clients under one rate limit, without a log entry.


@pytest.mark.parametrize("entry", ["192.0.2.{}:443", "[2001:db8:{}::1]:4711", "[2001:db8:{}::1]"])
async def test_clients_of_a_proxy_that_adds_ports_have_separate_rate_limits(
    entry: str, make_server: MakeServer, http: aiohttp.ClientSession
) -> None:
    rate = limits.parse(
        f"2/{secrets.randbelow(10**6) + 3600}seconds"
    )  # a unique window, because the tests share their stores
    ada = user(http, await make_server(rate_limit_auth=rate, **BEHIND_PROXY))
    assert [(await log_in(ada, address=entry.format(n))).status for n in range(1, 13)] == [401] * 12
    bare = entry.format(1).removesuffix(":443").removesuffix(":4711").strip("[]")
    assert [(await log_in(ada, address=bare)).status for _ in range(2)] == [401, 429]


NO_ADDRESSES = [
    *("unknown", "_hidden", "example.org", "for=203.0.113.7", '"203.0.113.7"', "\udcff", ""),
    *("203.0.113.7:", "203.0.113.7:x", "203.0.113.7:65536", "203.0.113.7:-1", "203.0.113.7:\u0664", ":443"),
    *("203.0.113", "203.0.113.7/24", "203.0.113.7:" + "0" * 60 + "1", "[203.0.113.7]:443"),
    *("[2001:db8::1", "2001:db8::1]", "[2001:db8::1]443", "[2001:db8::1]:", "[]", "fe80::1%eth0", "[fe80::1%1]:443"),
]


@pytest.mark.parametrize(
    ("entry", "address"),
    [
        ("203.0.113.7:4711", "203.0.113.7"),
        ("203.0.113.7", "203.0.113.7"),
        ("[2001:db8::1]:443", "2001:db8::1"),
        ("[2001:db8::1]", "2001:db8::1"),
        ("2001:DB8:0::1", "2001:db8::1"),
        ("[::ffff:203.0.113.7]:443", "203.0.113.7"),
        ("2001:db8::1:443", "2001:db8::1:443"),
        *[(entry, None) for entry in NO_ADDRESSES],
    ],
)
def test_an_entry_is_an_address_with_or_without_a_port_or_invalid(entry: str, address: str | None) -> None:
    parsed = forwarded.parse_entry(entry)
    assert (parsed and str(parsed)) == address


@NO_DEADLINE
@given(st.text(max_size=80))
def test_no_entry_breaks_a_server(entry: str) -> None:
    forwarded.parse_entry(entry)


def test_an_entry_that_is_no_address_is_counted_and_logged_once_a_minute(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [1000.0]
    monkeypatch.setattr(forwarded.time, "monotonic", lambda: clock[0])
    addresses = forwarded.ClientAddressResolver([ip_network("127.0.0.1"), ip_network("10.0.0.0/8")])

    def seen(header: str, peer: str = "127.0.0.1") -> str:
        return addresses.resolve(
            make_mocked_request("GET", "/", headers={"X-Forwarded-For": header}).clone(remote=peer)
        )

    before = malformed_entries()
    with capture_logs() as logs:
        assert seen("203.0.113.7, unknown") == "127.0.0.1"
        assert seen("203.0.113.7, _hidden, 10.1.2.3") == "10.1.2.3"  # the address of the proxy that added it
        assert seen("unknown, 203.0.113.7") == "203.0.113.7"  # the client's own entries are ignored
        assert seen("unknown", "198.51.100.1") == "198.51.100.1"
        clock[0] += 61
        assert seen("\u00ff" * 100) == "127.0.0.1"
    assert malformed_entries() == before + 3
    assert [(log["event"], log["log_level"]) for log in logs] == [("forwarded address malformed", "warning")] * 2
    assert (logs[0]["entry"], logs[0]["proxy"]) == ("'unknown'", "127.0.0.1")
    assert logs[1]["entry"].isascii()


def malformed_entries() -> float:
    return REGISTRY.get_sample_value("forwarded_malformed_total") or 0.0


# A signed token with an absurd iat was a 500.

KEY = "a secret of more than 32 bytes, for these tests"
HUGE = [10**15, 10**17, 10**18, 10**19, 10**30, 1e17, 1e308]
ABSURD = [*HUGE, *(-number for number in HUGE), -1, 0.5, float("inf"), float("nan"), "x", "1", "", None, True, [], {}]


def sign_token(claims: Any, key: str, **header: Any) -> str:
    """Return a token with any claims and header, because libraries refuse to sign most of these."""
    parts = [{"alg": "HS256", "typ": "JWT", "kid": KeyRing.from_secrets(key).signing_id, **header}, claims]
    text = ".".join(base64.urlsafe_b64encode(json.dumps(part).encode()).decode().rstrip("=") for part in parts)
    signature = hmac.digest(key.encode(), text.encode(), hashlib.sha256)
    return f"{text}.{base64.urlsafe_b64encode(signature).decode().rstrip('=')}"


def claims() -> dict[str, Any]:
    now = int(time.time())
    return {
        "iss": ISSUER,
        "aud": AUDIENCE,
        "sub": str(uuid4()),
        "sid": str(uuid4()),
        "jti": uuid4().hex,
        "typ": "access",
        "iat": now,
        "exp": now + 900,
    }


@pytest.mark.parametrize("claim", ["iat", "exp"])
async def test_a_signed_token_with_an_absurd_time_is_refused(
    claim: str, server: str, http: aiohttp.ClientSession, settings: Settings
) -> None:
    await all_refused(user(http, server), claim, ABSURD, settings)


@pytest.mark.parametrize("claim", ["jti", "sid", "sub"])
async def test_a_signed_token_with_an_absurd_id_is_refused(
    claim: str, server: str, http: aiohttp.ClientSession, settings: Settings
) -> None:
    """An id is part of a Redis key; an id that Redis cannot encode would also fail requests of other users."""
    absurd = ["\ud800", "\0", "", "x" * 1000, "a b", 7, None, [], {}]
    await all_refused(user(http, server), claim, absurd, settings)


async def all_refused(actor: Actor, claim: str, values: list[Any], settings: Settings) -> None:
    for value in values:
        actor.access_token = sign_token(claims() | {claim: value}, settings.jwt_secret)
        refused = await actor.get("/auth/profile")
        assert (refused.status, refused.code) == (401, "unauthenticated"), value


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)
NAMES = st.sampled_from([*claims(), "nbf", "x"])


@NO_DEADLINE
@given(st.dictionaries(NAMES, JSON, max_size=4), st.dictionaries(st.sampled_from(["kid", "typ", "crit", "b64"]), JSON))
def test_no_signed_token_breaks_a_server(changes: dict[str, Any], header: dict[str, Any]) -> None:
    verifier = Verifier(KeyRing.from_secrets(KEY), ttl=900)
    try:
        verified = verifier.verify(sign_token(claims() | changes, KEY, **header), now=datetime.now(UTC))
    except Unauthenticated:
        return
    assert len(verified.token_id) == 32
    assert verified.expires_at <= datetime.fromtimestamp(time.time() + 905, UTC)


@NO_DEADLINE
@given(JSON)
def test_no_signed_payload_breaks_a_server(payload: Any) -> None:
    with pytest.raises(Unauthenticated):
        Verifier(KeyRing.from_secrets(KEY), ttl=900).verify(sign_token(payload, KEY), now=datetime.now(UTC))


async def test_no_ticket_breaks_a_server(settings: Settings) -> None:
    async with redis_client(settings.redis_url) as redis:
        for ticket in ("\ud800", "\0", "", "x" * 100_000, "{auth}:*"):
            with pytest.raises(Unauthenticated):
                await tickets.redeem(redis, ticket=ticket)
