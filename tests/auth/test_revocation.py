"""The end of a session, for any reason, closes its sockets on every server within about a second."""

from collections.abc import Awaitable, Callable

import pytest

from server.auth import store
from tests.actors import PASSWORD, Actor
from tests.conftest import MakeActor, MakeServer

End = Callable[[Actor, Actor], Awaitable[object]]


async def session_of(actor: Actor) -> str:
    listed = (await actor.get("/auth/sessions"))["items"]
    return next(session["id"] for session in listed if session["current"])


async def revoke_one(alice: Actor, phone: Actor) -> None:
    await alice.delete(f"/auth/sessions/{await session_of(phone)}")


async def replay(_: Actor, phone: Actor) -> None:
    first = {"refreshToken": phone.refresh_token}
    second = {"refreshToken": (await phone.post("/auth/refresh", first))["refreshToken"]}
    await phone.post("/auth/refresh", second)
    assert (await phone.post("/auth/refresh", first)).code == "refresh_reused"


async def sign_in_too_often(alice: Actor, _: Actor) -> None:
    for _ in range(2):
        await alice.at(alice.base).log_in()


ENDS: dict[str, End] = {
    "logout": lambda _, phone: phone.post("/auth/logout"),
    "signed out from another device": revoke_one,
    "all others signed out": lambda alice, _: alice.delete("/auth/sessions"),
    "new password": lambda alice, _: alice.post(
        "/auth/password", {"currentPassword": PASSWORD, "newPassword": "Babbage1791"}
    ),
    "account deleted": lambda alice, _: alice.delete("/auth/profile", {"password": PASSWORD}),
    "refresh token stolen": replay,
    "too many devices": sign_in_too_often,
}


@pytest.mark.parametrize("end", ENDS)
async def test_ended_session_closes_its_sockets(
    end: str, make_server: MakeServer, make_actor: MakeActor, monkeypatch: pytest.MonkeyPatch
) -> None:
    here, there = await make_server(), await make_server()
    alice = await make_actor("Alice", here)
    phone = await alice.at(here).log_in()
    socket = await phone.at(there).connect()
    monkeypatch.setattr(store, "MAX_SESSIONS_PER_USER", 2)
    await ENDS[end](alice, phone)
    assert await socket.closed() == 4401
    assert (await phone.at(there).get("/auth/profile")).status == 401


async def test_the_device_that_changes_the_password_stays_connected(alice: Actor) -> None:
    socket = await alice.connect()
    await alice.post("/auth/password", {"currentPassword": PASSWORD, "newPassword": "Babbage1791"})
    await alice.delete("/auth/sessions")
    await socket.refute_push()
    assert (await socket.push("ping")).keys() == {"serverTime"}


async def test_a_ticket_opens_one_socket(alice: Actor, make_server: MakeServer) -> None:
    ticket = (await alice.post("/auth/ws-ticket"))["ticket"]
    guest = Actor(alice.http, await make_server(), "Guest")
    async with alice.http.ws_connect(f"{guest.base}/ws?ticket={ticket}") as raw:
        assert (await raw.receive_json())["data"]["userId"] == alice.id
    again = await guest.get(f"/ws?ticket={ticket}", headers=UPGRADE)
    assert (again.status, again.code) == (401, "unauthenticated")


async def test_ticket_of_an_ended_session_opens_no_socket(alice: Actor) -> None:
    ticket = (await alice.post("/auth/ws-ticket"))["ticket"]
    await alice.post("/auth/logout")
    refused = await Actor(alice.http, alice.base, "Guest").get(f"/ws?ticket={ticket}", headers=UPGRADE)
    assert (refused.status, refused.code) == (401, "unauthenticated")


UPGRADE = {
    "Connection": "Upgrade",
    "Upgrade": "websocket",
    "Sec-WebSocket-Version": "13",
    "Sec-WebSocket-Key": "AAAAAAAAAAAAAAAAAAAAAA==",
}
