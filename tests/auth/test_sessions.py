"""Sessions: devices sign in, rotate their refresh tokens, and are signed out."""

import asyncio
from collections import Counter

import asyncpg
import pytest

from server.auth import sessions, store
from tests.actors import PASSWORD, Actor, Response
from tests.conftest import MakeActor, MakeServer

REUSED, UNKNOWN = (401, "refresh_reused"), (401, "unauthenticated")


async def refresh(actor: Actor, token: str) -> Response:
    return await actor.post("/auth/refresh", {"refreshToken": token}, headers={"Authorization": "none"})


async def active_sessions(actor: Actor) -> list[str]:
    listed = await actor.get("/auth/sessions")
    assert listed.status == 200, listed
    return [session["id"] for session in listed["items"]]


async def test_refresh_token_is_exchanged_for_new_tokens(alice: Actor) -> None:
    fresh = await refresh(alice, alice.refresh_token)
    assert fresh.status == 200
    assert fresh.body.keys() == {"accessToken", "refreshToken", "tokenType", "expiresIn"}
    assert fresh.headers["Cache-Control"] == "no-store"
    assert fresh["refreshToken"] != alice.refresh_token
    before = await active_sessions(alice)
    alice.access_token = fresh["accessToken"]
    assert await active_sessions(alice) == before  # the same session


async def test_a_spent_token_used_again_ends_its_session(alice: Actor) -> None:
    phone = await alice.at(alice.base).log_in()
    stolen = alice.refresh_token
    second = (await refresh(alice, stolen))["refreshToken"]
    third = await refresh(alice, second)
    replayed = await refresh(alice, stolen)
    assert (replayed.status, replayed.code) == REUSED
    assert "WWW-Authenticate" in replayed.headers
    again = await refresh(alice, stolen)
    assert (again.status, again.code) == REUSED
    last = await refresh(alice, third["refreshToken"])
    assert (last.status, last.code) == UNKNOWN
    for access in (alice.access_token, third["accessToken"]):
        alice.access_token = access
        assert (await alice.get("/auth/profile")).status == 401
    assert len(await active_sessions(phone)) == 1  # the other device stays signed in


async def test_two_concurrent_refreshes_keep_the_session(alice: Actor) -> None:
    tabs = await asyncio.gather(*(refresh(alice, alice.refresh_token) for _ in range(2)))
    assert [tab.status for tab in tabs] == [200, 200]
    for tab in tabs:  # the client keeps the response that arrives last, and that may be either
        assert (await refresh(alice, tab["refreshToken"])).status == 200
    assert len(await active_sessions(alice)) == 1


async def test_spent_token_counts_as_reused_after_the_grace_period(
    alice: Actor, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert (await refresh(alice, alice.refresh_token)).status == 200
    monkeypatch.setattr(sessions, "REUSE_GRACE_SECONDS", 0.0)
    late = await refresh(alice, alice.refresh_token)
    assert (late.status, late.code) == REUSED


async def test_200_refreshes_of_one_token_on_two_servers_leave_one_family(
    make_server: MakeServer, make_actor: MakeActor
) -> None:
    first, second = await make_server(), await make_server()
    alice = await make_actor("Alice", first)
    twin = alice.at(second)
    responses = await asyncio.gather(*(refresh((alice, twin)[n % 2], alice.refresh_token) for n in range(200)))
    statuses = Counter(response.status for response in responses)
    assert statuses.keys() <= {200, 503}, statuses  # 503 on a busy machine
    assert statuses[200] >= 100, statuses
    assert len(await active_sessions(twin)) == 1
    (successor,) = {response["refreshToken"] for response in responses if response.status == 200}
    last = await refresh(twin, successor)
    assert last.status == 200

    replayed = await refresh(alice, alice.refresh_token)  # its successor is spent
    assert (replayed.status, replayed.code) == REUSED
    assert (await refresh(twin, last["refreshToken"])).status == 401
    assert (await twin.get("/auth/sessions")).status == 401


@pytest.mark.parametrize("token", ["x", "x" * 256, "ünïcode", "a.b.c"])
async def test_unknown_refresh_token_is_rejected(token: str, alice: Actor) -> None:
    refused = await refresh(alice, token)
    assert (refused.status, refused.code) == UNKNOWN


async def test_an_access_token_does_not_refresh(alice: Actor) -> None:
    refused = await refresh(alice, alice.access_token)
    assert refused.status in (401, 422)


async def test_logout_ends_the_session_and_its_tokens(alice: Actor, make_server: MakeServer) -> None:
    elsewhere = alice.at(await make_server())
    phone = await alice.at(alice.base).log_in()
    out = await alice.post("/auth/logout")
    assert (out.status, out.body) == (204, "")
    for device in (alice, elsewhere):
        refused = await device.get("/auth/profile")
        assert (refused.status, refused.code) == (401, "unauthenticated")
        assert refused.headers["WWW-Authenticate"] == 'Bearer error="invalid_token"'
    assert (await refresh(alice, alice.refresh_token)).status == 401
    assert (await phone.get("/auth/profile")).status == 200


async def test_logout_ends_the_session_of_a_refresh_token_only_of_the_same_user(alice: Actor, bob: Actor) -> None:
    phone = await alice.at(alice.base).log_in()
    assert (await alice.post("/auth/logout", {"refreshToken": bob.refresh_token})).status == 204
    assert (await bob.get("/auth/profile")).status == 200
    tablet = await phone.at(phone.base).log_in()
    assert (await tablet.post("/auth/logout", {"refreshToken": phone.refresh_token})).status == 204
    assert (await phone.get("/auth/profile")).status == 401


async def test_devices_are_listed_newest_first_page_by_page(alice: Actor) -> None:
    for n in range(4):
        device = alice.at(alice.base)
        login = {"email": alice.email, "password": PASSWORD}
        login_response = await device.post(
            "/auth/login", login, headers={"User-Agent": f"Device {n}", "Authorization": "none"}
        )
        assert login_response.status == 200, login_response
    listed, cursor = [], ""
    while cursor is not None:
        page = await alice.get(f"/auth/sessions?limit=2{cursor and '&cursor=' + cursor}")
        assert len(page["items"]) <= 2
        listed += page["items"]
        cursor = page["nextCursor"]
    assert [session["userAgent"] for session in listed[:4]] == [f"Device {n}" for n in (3, 2, 1, 0)]
    assert [session["current"] for session in listed] == [False] * 4 + [True]
    assert listed[0].keys() == {"id", "createdAt", "lastUsedAt", "expiresAt", "userAgent", "ip", "current"}
    assert {session["ip"] for session in listed} == {"127.0.0.1"}


@pytest.mark.parametrize(
    "query",
    [
        "limit=0",
        "limit=101",
        "limit=x",
        "limit=1.5",
        "cursor=x",  # the next ones: not an id, no time zone, before the first year
        "cursor=WyJzZXNzaW9ucyIsICIyMDIwLTAxLTAxIiwgImEiXQ",
        "cursor=WyJzZXNzaW9ucyIsICIyMDIwLTAxLTAxIiwgIjAwMDAwMDAwLTAwMDAtMDAwMC0wMDAwLTAwMDAwMDAwMDAwMCJd",
        "cursor=WyJzZXNzaW9ucyIsICIwMDAxLTAxLTAxVDAwOjAwOjAwKzE0OjAwIiwgIjAwMDAwMDAwLTAwMDAtMDAwMC0wMDAwLTAwMDAwMDAwMDAwMCJd",
    ],
)
async def test_invalid_page_is_rejected(query: str, alice: Actor) -> None:
    refused = await alice.get(f"/auth/sessions?{query}")
    assert (refused.status, refused.code) == (422, "validation_failed")


async def test_a_device_can_be_signed_out_from_another(alice: Actor, bob: Actor) -> None:
    phone = await alice.at(alice.base).log_in()
    tablet = await alice.at(alice.base).log_in()
    phones = (await phone.get("/auth/sessions"))["items"]
    current = next(session["id"] for session in phones if session["current"])
    foreign = await bob.delete(f"/auth/sessions/{current}")
    assert (foreign.status, foreign.code) == (404, "not_found")
    assert (await phone.get("/auth/profile")).status == 200

    for path in (f"/auth/sessions/{current}", "/auth/sessions"):  # resources without an ETag
        assert (await alice.delete(path, headers={"If-Match": '"1"'})).status == 412
    assert (await alice.delete(f"/auth/sessions/{current}")).status == 204
    assert (await phone.get("/auth/profile")).status == 401
    assert (await alice.delete(f"/auth/sessions/{current}")).status == 404
    assert (await alice.delete("/auth/sessions/no-id")).status == 404

    assert (await alice.delete("/auth/sessions")).status == 204
    assert (await tablet.get("/auth/profile")).status == 401
    assert (await refresh(tablet, tablet.refresh_token)).status == 401
    assert len(await active_sessions(alice)) == 1


async def test_session_unused_longest_ends_beyond_the_maximum(alice: Actor, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store, "MAX_SESSIONS_PER_USER", 3)
    devices = [await alice.at(alice.base).log_in() for _ in range(3)]
    assert (await alice.get("/auth/profile")).status == 401
    assert len(await active_sessions(devices[0])) == 3


async def test_device_may_send_any_user_agent(alice: Actor) -> None:
    """Header bytes that are not UTF-8 do not prevent a login."""
    login = {"email": alice.email, "password": PASSWORD}
    headers = {"User-Agent": "Räuber \udcff\udc80 " + "x" * 600, "Authorization": "none"}
    login_response = await alice.post("/auth/login", login, headers=headers)
    assert login_response.status == 200, login_response
    user_agent = (await alice.get("/auth/sessions"))["items"][0]["userAgent"]
    assert user_agent.startswith("Räuber ")
    assert len(user_agent) == 512


async def test_expired_sessions_and_their_tokens_are_deleted(alice: Actor, bob: Actor, database_url: str) -> None:
    db = await asyncpg.connect(database_url)
    try:
        await db.execute("UPDATE sessions SET expires_at = now() - interval '8 days' WHERE user_id = $1", alice.id)
        await sessions.delete_expired_sessions(db)
        left = await db.fetch(
            """
            SELECT user_id::text FROM sessions s JOIN refresh_tokens t ON t.session_id = s.id
            WHERE user_id = ANY ($1)
            """,
            [alice.id, bob.id],
        )
    finally:
        await db.close()
    assert [row["user_id"] for row in left] == [bob.id]


async def test_session_with_thousands_of_tokens_is_deleted_in_batches(alice: Actor, database_url: str) -> None:
    db = await asyncpg.connect(database_url)
    try:
        session = (await active_sessions(alice))[0]
        await db.execute(
            """
            INSERT INTO refresh_tokens (hash, session_id, expires_at)
            SELECT sha256(($1 || n)::bytea), $1::text::uuid, now() FROM generate_series(1, 2500) n
            """,
            session,
        )
        await db.execute("UPDATE sessions SET expires_at = now() - interval '8 days' WHERE user_id = $1", alice.id)
        assert 0 < await store.delete_expired_sessions(db, retention_days=7) <= 1100
        await sessions.delete_expired_sessions(db)
        assert await db.fetchval("SELECT count(*) FROM refresh_tokens WHERE session_id = $1", session) == 0
        assert await db.fetchval("SELECT count(*) FROM sessions WHERE id = $1", session) == 0
    finally:
        await db.close()
