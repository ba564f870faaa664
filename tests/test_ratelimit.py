"""Rate limits: exact over all processes, shown in the standard headers, and never a reason to hang."""

import asyncio
import re
import secrets
import time
from collections import Counter
from ipaddress import IPv6Address, ip_network
from typing import Any

import aiohttp
import limits
import pytest
from aiohttp.test_utils import make_mocked_request
from prometheus_client import REGISTRY

from server import ratelimit
from server.pipelines import Pipelines
from server.ratelimit import QuotaExceeded, RateLimiter, limit_key
from server.resources import redis_client
from server.rest.forwarded import ClientAddressResolver
from server.settings import Settings
from tests.actors import PASSWORD, Actor, Response
from tests.conftest import MakeActor, MakeServer
from tests.faults import FaultyNetwork, Mode
from tests.timeouts import WAIT_TIMEOUT_SECONDS

WINDOW = 900
TEN = limits.parse("10/15minutes")
PROXY = {"trusted_proxies": (ip_network("127.0.0.1"), ip_network("10.0.0.0/8"))}


def from_address(address: str) -> dict[str, str]:
    """Return the headers of a proxy; every test has its own addresses, because tests share the store."""
    return {"X-Forwarded-For": address}


def fresh_address() -> str:
    return str(IPv6Address(0x20010DB8 << 96 | secrets.randbits(32) << 64 | 1))


async def wrong_login(actor: Actor, address: str) -> Response:
    body = {"email": "nobody@example.org", "password": "Wrong12345"}
    return await actor.post("/auth/login", body, headers=from_address(address))


def quota_headers(response: Response) -> tuple[str, int, int]:
    """Return the name of the quota, the remaining requests, and the seconds until its reset."""
    name, left, seconds = re.fullmatch(r'"(\w+)";r=(\d+);t=(\d+)', response.headers["RateLimit"]).groups()
    return name, int(left), int(seconds)


async def test_limit_of_10_allows_exactly_10_of_300_concurrent_requests(
    make_server: MakeServer, http: aiohttp.ClientSession
) -> None:
    servers = [await make_server(rate_limit_auth=TEN, **PROXY) for _ in range(2)]
    actors = [Actor(http, base, "Anonymous") for base in servers]
    address = fresh_address()
    responses = await asyncio.gather(*(wrong_login(actors[n % 2], address) for n in range(300)))
    assert Counter(response.status for response in responses) == {401: 10, 429: 290}
    assert {response.code for response in responses if response.status == 429} == {"rate_limited"}


async def test_headers_show_the_remaining_quota_and_its_reset(
    make_server: MakeServer, http: aiohttp.ClientSession
) -> None:
    actor = Actor(http, await make_server(rate_limit_auth=TEN, **PROXY), "Anonymous")
    address, started = fresh_address(), time.monotonic()
    for left in (*range(9, -1, -1), 0):
        response = await wrong_login(actor, address)
        assert response.headers["RateLimit-Policy"] == '"auth";q=10;w=900'
        name, remaining, seconds = quota_headers(response)
        assert (name, remaining) == ("auth", left)
        assert WINDOW - (time.monotonic() - started) - 1 <= seconds <= WINDOW
    assert response.status == 429
    assert response.headers["Retry-After"] == str(seconds)
    assert response.body.keys() >= {"title", "detail", "status", "requestId"}


async def test_client_that_waits_for_retry_after_is_allowed(
    make_server: MakeServer, http: aiohttp.ClientSession
) -> None:
    actor = Actor(http, await make_server(rate_limit_auth=limits.parse("1/6seconds"), **PROXY), "Anonymous")
    address = fresh_address()
    assert (await wrong_login(actor, address)).status == 401
    await asyncio.sleep(0.6)  # a rounded clock would return 5 seconds, while 5.4 are left
    rejected = await wrong_login(actor, address)
    assert rejected.status == 429
    await asyncio.sleep(int(rejected.headers["Retry-After"]))
    assert (await wrong_login(actor, address)).status == 401


async def test_register_login_refresh_and_password_share_one_quota(
    make_server: MakeServer, http: aiohttp.ClientSession
) -> None:
    actor = Actor(http, await make_server(rate_limit_auth=TEN, rate_limit_default=TEN, **PROXY), "Ada")
    headers = from_address(fresh_address())
    calls: list[tuple[str, dict[str, Any]]] = [
        ("/auth/register", {"email": actor.email, "password": PASSWORD, "name": "Ada"}),
        ("/auth/login", {"email": actor.email, "password": PASSWORD}),
        ("/auth/refresh", {"refreshToken": "unknown"}),
        ("/auth/password", {"currentPassword": "Wrong12345", "newPassword": PASSWORD}),
        ("/auth/register", {}),  # requests with an invalid body count, too
    ]
    for spent, (path, body) in enumerate(calls, 1):
        response = await actor.post(path, body, headers=headers)
        assert quota_headers(response)[:2] == ("auth", 10 - spent), path
        actor.access_token = actor.access_token or response["accessToken"]
    other = await actor.get("/auth/profile", headers=headers)
    assert quota_headers(other)[:2] == ("default", 9)


async def test_signed_in_users_have_their_own_quotas(make_server: MakeServer, make_actor: MakeActor) -> None:
    base = await make_server(rate_limit_default=limits.parse("3/15minutes"))
    ada, bob = await make_actor("Ada", base), await make_actor("Bob", base)
    assert [(await ada.get("/auth/profile")).status for _ in range(4)] == [200, 200, 200, 429]
    assert (await bob.get("/auth/profile")).status == 200
    assert (await ada.at(base).get("/projects")).status == 429  # one quota for all other endpoints
    assert (await ada.get("/health")).status == 200
    assert "RateLimit" not in (await ada.get("/health")).headers


async def test_anonymous_requests_share_the_quota_of_their_address(
    make_server: MakeServer, http: aiohttp.ClientSession
) -> None:
    actor = Actor(http, await make_server(rate_limit_default=limits.parse("3/15minutes"), **PROXY), "Anonymous")
    for token in ("", "forged"):
        actor.access_token, headers = token, from_address(fresh_address())
        responses = [await actor.get("/auth/profile", headers=headers) for _ in range(4)]
        assert [response.status for response in responses] == [401, 401, 401, 429]
        assert [quota_headers(response)[1] for response in responses] == [2, 1, 0, 0]


async def test_token_of_an_ended_session_does_not_consume_the_quota_of_its_user(
    make_server: MakeServer, make_actor: MakeActor
) -> None:
    base = await make_server(rate_limit_default=limits.parse("5/15minutes"), **PROXY)
    ada = await make_actor("Ada", base)
    thief = ada.at(base)
    await ada.log_in()
    assert (await thief.post("/auth/logout")).status == 204  # one of Ada's five requests
    headers = from_address(fresh_address())
    responses = [await thief.get("/auth/profile", headers=headers) for _ in range(6)]
    assert [response.status for response in responses] == [401] * 5 + [429]
    assert quota_headers(await ada.get("/auth/profile"))[1] == 3


async def test_forwarded_address_counts_from_trusted_proxies_only(
    make_server: MakeServer, http: aiohttp.ClientSession
) -> None:
    two = limits.parse("2/15minutes")
    trusting = Actor(http, await make_server(rate_limit_auth=two, **PROXY), "Anonymous")
    address = fresh_address()
    forged = f"1.2.3.4, {address}, 10.1.2.3"  # set by the client, the real client, an inner proxy
    assert quota_headers(await wrong_login(trusting, address))[1] == 1
    assert quota_headers(await wrong_login(trusting, forged))[1] == 0
    assert (await wrong_login(trusting, f"9.9.9.9, {address}")).status == 429
    assert (await wrong_login(trusting, fresh_address())).status == 401

    # A limit of this test only: no other test uses this window from 127.0.0.1.
    odd = limits.parse("2/17minutes")
    wary = Actor(http, await make_server(rate_limit_auth=odd), "Anonymous")
    assert [(await wrong_login(wary, fresh_address())).status for _ in range(3)] == [401, 401, 429]


@pytest.mark.parametrize("mapped", ["::ffff:192.0.2.1", "::FFFF:c000:201"])
def test_ipv4_mapped_ipv6_address_equals_its_ipv4_address(mapped: str) -> None:
    def seen(peer: str, forwarded: str, *trusted: str) -> str:
        request = make_mocked_request("GET", "/", headers={"X-Forwarded-For": forwarded} if forwarded else {})
        return ClientAddressResolver([ip_network(network) for network in trusted]).resolve(request.clone(remote=peer))

    assert seen(mapped, "") == "192.0.2.1"
    assert seen(mapped, "192.0.2.9", "192.0.2.1") == "192.0.2.9"
    assert seen("192.0.2.1", "::ffff:192.0.2.9", "192.0.2.1") == "192.0.2.9"
    assert seen("2001:db8::1", "") == "2001:db8::1"


def fallbacks() -> float:
    return REGISTRY.get_sample_value("rate_limiter_fallbacks_total") or 0.0


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ("2001:db8:1:2::1", "2001:db8:1:2:ffff::9", True),
        ("2001:db8:1:2::1", "2001:db8:1:3::1", False),
        ("192.0.2.1", "192.0.2.2", False),
        ("fe80::1%eth0", "fe80::1%eth0", True),
    ],
)
def test_ipv6_addresses_of_one_network_share_a_quota(one: str, other: str, same: bool) -> None:
    assert (limit_key("auth", client=one) == limit_key("auth", client=other)) is same


async def test_each_process_counts_locally_while_redis_is_unavailable(unused_tcp_port: int) -> None:
    redis = redis_client(f"redis://127.0.0.1:{unused_tcp_port}")
    pipelines = Pipelines(redis)
    limiter = RateLimiter(pipelines, rates={"auth": TEN})
    before, started = fallbacks(), time.monotonic()
    try:
        quotas = [await limiter.hit("auth", "client") for _ in range(12)]
        assert [quota.allowed for quota in quotas if quota] == [True] * 10 + [False] * 2
        assert [quota.remaining for quota in quotas if quota] == [*range(9, -1, -1), 0, 0]
        least = WINDOW - 1 - (time.monotonic() - started)
        assert all(least <= quota.reset <= WINDOW for quota in quotas if quota)
        assert fallbacks() == before + 12
    finally:
        await pipelines.close()
        await redis.aclose()


@pytest.mark.parametrize("away", [False, True])
async def test_refunded_hits_and_no_more_can_be_consumed_again(
    away: bool, settings: Settings, unused_tcp_port: int
) -> None:
    redis = redis_client(f"redis://127.0.0.1:{unused_tcp_port}" if away else settings.redis_url)
    pipelines = Pipelines(redis)
    limiter, key = RateLimiter(pipelines, rates={"auth": TEN, "off": None}), secrets.token_hex()

    async def passing(times: int) -> int:
        return sum([quota.allowed for _ in range(times) if (quota := await limiter.hit("auth", key))])

    try:
        await limiter.refund("auth", key)  # there is no hit yet
        assert await passing(15) == 10
        for _ in range(3):
            await limiter.refund("auth", key)
        assert await passing(15) == 3  # rejected hits have not counted
        with pytest.raises(QuotaExceeded) as exceeded:
            await limiter.consume("auth", key)
        assert exceeded.value.retry_after == exceeded.value.quota.reset > WINDOW - 60
        assert await limiter.consume("off", key) is None
        await limiter.refund("off", key)
    finally:
        await pipelines.close()
        await redis.aclose()


async def test_server_counts_locally_during_a_redis_outage_and_globally_afterwards(
    make_server: MakeServer,
    http: aiohttp.ClientSession,
    isolated_stores: dict[str, str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(ratelimit, "LOCAL_FALLBACK_SECONDS", 1.0)
    async with FaultyNetwork.start({"redis_url": isolated_stores["redis_url"]}) as network:
        limited: dict[str, Any] = {"rate_limit_auth": TEN, **PROXY}
        here, there = [
            Actor(http, await make_server(**urls, **limited), "Anonymous")
            for urls in (isolated_stores | network.urls, isolated_stores)
        ]
        address = fresh_address()
        assert [quota_headers(await wrong_login(actor, address))[1] for actor in (here, there)] == [9, 8]
        await network.stores["redis_url"].set_mode(Mode.STOPPED)
        address = fresh_address()
        responses = await asyncio.gather(*(wrong_login(here, address) for _ in range(40)))
        assert Counter(response.status for response in responses) == {401: 10, 429: 30}
        assert quota_headers(await wrong_login(there, address))[1] == 9  # the other server does not see these hits
        await network.stores["redis_url"].set_mode(Mode.PASS)
        async with asyncio.timeout(WAIT_TIMEOUT_SECONDS):
            while (await wrong_login(here, address)).status == 429:
                await asyncio.sleep(0.1)
        assert (
            quota_headers(await wrong_login(there, address))[1]
            == quota_headers(await wrong_login(here, address))[1] + 1
        )


@pytest.mark.real_timeouts("redis_url")
async def test_concurrent_requests_wait_only_once_for_a_hanging_redis(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ratelimit, "LOCAL_FALLBACK_SECONDS", 600.0)

    async def swallow(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read()
        writer.close()

    silent = await asyncio.start_server(swallow, "127.0.0.1", 0)
    redis = redis_client(f"redis://127.0.0.1:{silent.sockets[0].getsockname()[1]}")
    pipelines = Pipelines(redis)
    limiter = RateLimiter(pipelines, rates={"auth": TEN})
    try:
        quotas = await asyncio.gather(*(limiter.hit("auth", "client") for _ in range(300)))
        assert sum(quota.allowed for quota in quotas if quota) == 10
        monkeypatch.setattr(pipelines, "submit", None)  # the limiter does not try Redis now
        assert await limiter.hit("auth", "client")
    finally:
        await pipelines.close()
        await redis.aclose()
        silent.close()


async def test_disabled_limit_counts_nothing(make_server: MakeServer, http: aiohttp.ClientSession) -> None:
    response = await wrong_login(Actor(http, await make_server(), "Anonymous"), fresh_address())
    assert "RateLimit" not in response.headers


@pytest.mark.parametrize("status", [401, 404, 405, 422])
async def test_error_responses_carry_the_rate_limit_headers(
    status: int, make_server: MakeServer, make_actor: MakeActor
) -> None:
    base = await make_server(rate_limit_default=limits.parse("100/15minutes"))
    alice = await make_actor("Alice", base)
    responses = {
        401: lambda: Actor(alice.http, base, "Anonymous").get("/auth/profile"),
        404: lambda: alice.get("/projects/no-id"),
        405: lambda: alice.put("/auth/profile", {}),
        422: lambda: alice.patch("/auth/profile", {"name": 1}),
    }
    response = await responses[status]()
    assert response.status == status
    assert ("RateLimit" in response.headers) == (status != 405)  # no endpoint, no limit
