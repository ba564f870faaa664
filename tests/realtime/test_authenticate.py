"""Authentication of sockets: accepted and rejected credentials, origins, and the expiry of tokens."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import aiohttp
import orjson
import psycopg
import pytest

from server.realtime import endpoint
from tests.actors import Actor
from tests.conftest import MakeActor, MakeServer
from tests.sockets import ErrorReply, SocketClient
from tests.timeouts import WAIT_TIMEOUT_SECONDS


@asynccontextmanager
async def opened(actor: Actor, query: str = "", **options: Any) -> AsyncIterator[SocketClient]:
    """A socket that is opened without the actor's Authorization header, and has received nothing yet."""
    async with actor.http.ws_connect(f"{actor.base}/ws{query}", **options) as raw:
        yield SocketClient(raw)


async def refusal(actor: Actor, query: str = "", **headers: str) -> tuple[int, str, str]:
    """Return status, content type and code of a rejected upgrade."""
    upgrade = {
        "Connection": "Upgrade",
        "Upgrade": "websocket",
        "Sec-WebSocket-Version": "13",
        "Sec-WebSocket-Key": "dGhlIHNhbXBsZSBub25jZQ==",
    }
    async with actor.http.get(f"{actor.base}/ws{query}", headers={**upgrade, **headers}) as response:
        return response.status, response.content_type, orjson.loads(await response.read())["code"]


UNAUTHENTICATED = (401, "application/problem+json", "unauthenticated")


async def test_welcome_names_the_user_and_the_limits(alice: Actor) -> None:
    welcome = (await alice.connect()).welcome
    assert (welcome["userId"], welcome["userName"]) == (alice.id, "Alice")
    assert welcome["heartbeatSeconds"] == 25
    assert welcome["maxMessageBytes"] == 256 << 10
    assert welcome["connectionId"]
    assert welcome["tokenExpiresAt"].endswith("Z")


async def test_subprotocol_carries_a_token(alice: Actor) -> None:
    async with opened(alice, protocols=["collab.v1", f"bearer.{alice.access_token}"]) as socket:
        await socket.assert_push("welcome", userId=alice.id)
        assert socket.raw.protocol == "collab.v1"


async def test_ticket_opens_only_one_socket(alice: Actor) -> None:
    ticket = (await alice.post("/auth/ws-ticket"))["ticket"]
    async with opened(alice, f"?ticket={ticket}") as socket:
        await socket.assert_push("welcome", userId=alice.id)
    assert await refusal(alice, f"?ticket={ticket}") == UNAUTHENTICATED


async def test_invalid_credentials_are_rejected_before_the_upgrade(alice: Actor) -> None:
    assert await refusal(alice, Authorization="Bearer nonsense") == UNAUTHENTICATED
    assert await refusal(alice, Authorization=f"Bearer {alice.refresh_token}") == UNAUTHENTICATED
    assert await refusal(alice, Authorization="Basic YTpi") == UNAUTHENTICATED
    assert await refusal(alice, **{"Sec-WebSocket-Protocol": "collab.v1, bearer.nonsense"}) == UNAUTHENTICATED
    assert await refusal(alice, "?ticket=nonsense") == UNAUTHENTICATED
    alone = {"Sec-WebSocket-Protocol": f"bearer.{alice.access_token}"}
    assert await refusal(alice, **alone) == UNAUTHENTICATED, "the server must not select a secret as subprotocol"


async def test_valid_token_in_the_url_is_rejected(alice: Actor) -> None:
    assert await refusal(alice, f"?token={alice.access_token}") == UNAUTHENTICATED
    assert await refusal(alice, f"?access_token={alice.access_token}") == UNAUTHENTICATED


async def test_token_of_an_ended_session_is_rejected(alice: Actor) -> None:
    await alice.post("/auth/logout")
    assert await refusal(alice, **alice.headers) == UNAUTHENTICATED


async def test_foreign_origin_is_rejected(make_server: MakeServer, make_actor: MakeActor) -> None:
    alice = await make_actor("Alice", await make_server(cors_origin=("https://app.example",)))
    foreign = (403, "application/problem+json", "forbidden")
    assert await refusal(alice, **alice.headers, Origin="https://evil.example") == foreign
    assert await refusal(alice, **alice.headers, Origin="null") == foreign
    own = alice.base.replace("http", "https", 1)
    for origin in ("https://app.example", own):
        async with opened(alice, headers=alice.headers, origin=origin) as socket:
            await socket.assert_push("welcome")


async def test_first_frame_may_authenticate(alice: Actor) -> None:
    async with opened(alice) as socket:
        await socket.send("authenticate", {"token": alice.access_token}, id="a")
        await socket.assert_push("welcome", userId=alice.id)
        reply = await socket.next()
        assert (reply["event"], reply["id"]) == ("ack", "a")
        assert reply["data"].keys() == {"tokenExpiresAt"}
        assert (await socket.push("ping")).keys() == {"serverTime"}


async def test_first_frame_that_does_not_authenticate_closes_the_socket(alice: Actor) -> None:
    for event, data in (("ping", {}), ("authenticate", {"token": "nonsense"}), ("authenticate", {})):
        async with opened(alice) as socket:
            await socket.send(event, data, id=1)
            reply = await socket.next()
            assert (reply["event"], reply["id"]) == ("error", 1)
            assert await socket.closed() == 4401


async def test_silent_client_times_out_before_authentication(alice: Actor, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(endpoint, "AUTHENTICATE_TIMEOUT_SECONDS", 0.3)
    async with opened(alice) as socket:
        assert await socket.closed() == 4408


async def test_client_that_only_pings_before_the_first_frame_is_rejected(alice: Actor) -> None:
    async with opened(alice) as socket:
        for _ in range(100):
            await socket.raw.ping()
        assert await socket.closed() == 4400


async def test_rejected_client_that_keeps_sending_is_aborted(alice: Actor, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(endpoint, "REJECTION_CLOSE_TIMEOUT_SECONDS", 30.0)
    async with opened(alice, autoclose=False) as socket:
        await socket.raw.send_str("nonsense")

        async def keep_sending() -> None:
            while True:
                await socket.raw.ping()
                await asyncio.sleep(0)

        with pytest.raises(ConnectionError):
            await asyncio.wait_for(keep_sending(), WAIT_TIMEOUT_SECONDS)


async def test_unexpected_error_closes_the_socket_without_an_http_response(alice: Actor, database_url: str) -> None:
    with psycopg.connect(database_url, autocommit=True) as connection:
        async with opened(alice) as socket:
            connection.execute("ALTER TABLE sessions RENAME TO elsewhere")
            try:
                await socket.send("authenticate", {"token": alice.access_token})
                assert await socket.closed() == 1011
            finally:
                connection.execute("ALTER TABLE elsewhere RENAME TO sessions")


async def test_client_is_warned_one_minute_before_its_token_expires(
    make_server: MakeServer, make_actor: MakeActor
) -> None:
    alice = await make_actor("Alice", await make_server(access_token_ttl=62))
    socket = await alice.connect()
    await socket.refute_push(seconds=0.5)
    await socket.assert_push("token:expiring", tokenExpiresAt=socket.welcome["tokenExpiresAt"])


async def test_token_is_renewed_on_a_live_connection(make_server: MakeServer, make_actor: MakeActor) -> None:
    alice = await make_actor("Alice", await make_server(access_token_ttl=8))
    socket = await alice.connect()
    await socket.assert_push("token:expiring", tokenExpiresAt=socket.welcome["tokenExpiresAt"])
    refreshed = await alice.post("/auth/refresh", {"refreshToken": alice.refresh_token})
    ack = await socket.push("authenticate", token=refreshed["accessToken"])
    assert ack["tokenExpiresAt"] >= socket.welcome["tokenExpiresAt"]
    await socket.assert_push("token:expiring", tokenExpiresAt=ack["tokenExpiresAt"])
    assert await socket.closed() == 4401


async def test_token_of_another_user_does_not_change_the_user(alice: Actor, bob: Actor) -> None:
    socket = await alice.connect()
    with pytest.raises(ErrorReply, match="forbidden"):
        await socket.push("authenticate", token=bob.access_token)
    with pytest.raises(ErrorReply, match="unauthenticated"):
        await socket.push("authenticate", token="nonsense")
    await socket.push("ping")


async def test_peer_without_heartbeat_is_closed(alice: Actor, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("server.realtime.hub.HEARTBEAT_INTERVAL_SECONDS", 2.0)
    lively = await alice.connect()
    answering = asyncio.create_task(lively.raw.receive())  # aiohttp replies to pings only during a receive
    async with opened(alice, headers=alice.headers, autoping=False) as silent:
        await silent.assert_push("welcome")
        while (message := await silent.raw.receive(timeout=WAIT_TIMEOUT_SECONDS)).type is aiohttp.WSMsgType.PING:
            pass
        assert (message.type, message.data) == (aiohttp.WSMsgType.CLOSE, 4408)
        await silent.raw.close()
    assert not answering.done()
    answering.cancel()
    await asyncio.gather(answering, return_exceptions=True)
    await lively.push("ping")
