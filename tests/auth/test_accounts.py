"""Accounts: registration, profile, password and deletion over REST."""

import asyncio
from datetime import timedelta
from typing import Any

import aiohttp
import asyncpg
import pytest

from server.projects.invitations import token_hash
from tests.actors import PASSWORD, Actor, Response
from tests.conftest import MakeActor
from tests.timeouts import WAIT_TIMEOUT_SECONDS

USER_KEYS = {"id", "email", "name", "avatarUrl", "createdAt", "updatedAt"}
OTHER_PASSWORD = "Babbage1791"


async def register(http: aiohttp.ClientSession, base: str, **body: Any) -> Response:
    newcomer = Actor(http, base, "Newcomer")
    return await newcomer.post(
        "/auth/register", {"email": newcomer.email, "password": PASSWORD, "name": "New Comer"} | body
    )


async def invite(db: asyncpg.Connection, owner: Actor, project: str, email: str, *, expires_in: timedelta) -> str:
    """Insert a pending invitation; return its token."""
    token = f"invitation-for-{email}"
    await db.execute(
        """
        INSERT INTO invitations (project_id, email, role, token_hash, invited_by, expires_at)
        VALUES ($1, $2, 'VIEWER', $3, $4, now() + $5)
        """,
        project,
        email,
        token_hash(token),
        owner.id,
        expires_in,
    )
    return token


@pytest.fixture
async def db(database_url: str) -> Any:
    connection = await asyncpg.connect(database_url)
    yield connection
    await connection.close()


async def test_registration_signs_in_and_returns_no_secret(http: aiohttp.ClientSession, server: str) -> None:
    registered = await register(http, server, email=Actor(http, server, "Ada").email.title())
    assert registered.status == 201
    assert registered.body.keys() == {"user", "accessToken", "refreshToken", "tokenType", "expiresIn"}
    assert registered["user"].keys() == USER_KEYS
    assert (registered["tokenType"], registered["expiresIn"]) == ("Bearer", 900)
    assert registered.headers["Cache-Control"] == "no-store"
    assert registered.headers["Location"] == "/api/v1/auth/profile"


async def test_one_of_20_concurrent_registrations_of_an_address_succeeds(
    http: aiohttp.ClientSession, server: str
) -> None:
    email = Actor(http, server, "Twin").email
    spellings = [email, email.upper(), email.title()]
    responses = await asyncio.gather(*(register(http, server, email=spellings[n % 3]) for n in range(20)))
    refused = [response for response in responses if response.status != 201]
    assert len(refused) == 19
    assert {(response.status, response.code) for response in refused} == {(409, "email_taken")}


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("email", "no-address"),
        ("email", "a" * 250 + "@example.org"),
        ("email", None),
        ("password", "Short1a"),
        ("password", "alllowercase1"),
        ("password", "ALLUPPERCASE1"),
        ("password", "NoDigitsAtAll"),
        ("password", "Aa1" + "x" * 126),
        ("name", "A"),
        ("name", "x" * 101),
        ("name", "nul\0nul"),
        ("role", "OWNER"),
    ],
)
async def test_invalid_registration_names_the_field(
    field: str, value: Any, http: aiohttp.ClientSession, server: str
) -> None:
    refused = await register(http, server, **{field: value})
    assert (refused.status, refused.code) == (422, "validation_failed")
    assert "\0" in str(value) or {detail["field"] for detail in refused["details"]} == {field}


async def test_the_profile_is_read_and_changed_by_its_revision(alice: Actor) -> None:
    read = await alice.get("/auth/profile")
    assert (read.status, read.body.keys()) == (200, USER_KEYS)
    tag = read.headers["ETag"]
    assert (await alice.get("/auth/profile", headers={"If-None-Match": tag})).status == 304
    changed = await alice.patch("/auth/profile", {"name": "Alice II"}, headers={"If-Match": tag})
    assert (changed.status, changed["name"], changed["avatarUrl"]) == (200, "Alice II", None)
    assert changed.headers["ETag"] != tag
    late = await alice.patch("/auth/profile", {"name": "Alice III"}, headers={"If-Match": tag})
    assert (late.status, late.code) == (412, "precondition_failed")
    now = await alice.get("/auth/profile")
    assert (now["name"], now.headers["ETag"]) == ("Alice II", changed.headers["ETag"])


async def test_an_avatar_is_set_kept_and_removed(alice: Actor) -> None:
    avatar = "https://example.org/alice.png"
    assert (await alice.patch("/auth/profile", {"avatarUrl": avatar}))["avatarUrl"] == avatar
    assert (await alice.patch("/auth/profile", {"name": "Alicia"}))["avatarUrl"] == avatar
    assert (await alice.patch("/auth/profile"))["avatarUrl"] == avatar
    assert (await alice.patch("/auth/profile", {"avatarUrl": None}))["avatarUrl"] is None


@pytest.mark.parametrize(
    "change",
    [
        {"name": ""},
        {"name": None},
        {"name": 7},
        {"avatarUrl": "javascript:alert(1)"},
        {"avatarUrl": "https://example.org/" + "a" * 2048},
        {"email": "other@example.org"},
        {"passwordHash": "x"},
        {"revision": 1},
        {"id": "00000000-0000-0000-0000-000000000000"},
    ],
)
async def test_other_fields_of_a_profile_cannot_be_set(change: dict[str, Any], alice: Actor) -> None:
    refused = await alice.patch("/auth/profile", change)
    assert (refused.status, refused.code) == (422, "validation_failed")
    assert {detail["field"] for detail in refused["details"]} == change.keys()


async def test_one_of_50_changes_on_one_etag_succeeds(alice: Actor) -> None:
    tag = (await alice.get("/auth/profile")).headers["ETag"]
    changes = (alice.patch("/auth/profile", {"name": f"Alice {n}"}, headers={"If-Match": tag}) for n in range(50))
    statuses = [response.status for response in await asyncio.gather(*changes)]
    assert sorted(statuses) == [200] + [412] * 49


async def test_a_new_password_ends_every_other_session(alice: Actor) -> None:
    phone = await alice.at(alice.base).log_in()
    wrong = await alice.post("/auth/password", {"currentPassword": "Wrong12345", "newPassword": OTHER_PASSWORD})
    assert (wrong.status, wrong.code) == (401, "invalid_credentials")
    weak = await alice.post("/auth/password", {"currentPassword": PASSWORD, "newPassword": "weak"})
    assert (weak.status, weak["details"][0]["field"]) == (422, "newPassword")
    tag = (await phone.get("/auth/profile")).headers["ETag"]

    done = await alice.post("/auth/password", {"currentPassword": PASSWORD, "newPassword": OTHER_PASSWORD})
    assert (done.status, done.body) == (204, "")
    assert (await phone.get("/auth/profile")).status == 401
    assert (await phone.post("/auth/refresh", {"refreshToken": phone.refresh_token})).status == 401
    assert (await alice.get("/auth/profile", headers={"If-None-Match": tag})).status == 200  # updatedAt changed
    assert (await alice.post("/auth/refresh", {"refreshToken": alice.refresh_token})).status == 200
    old = await phone.post("/auth/login", {"email": alice.email, "password": PASSWORD})
    assert (old.status, old.code) == (401, "invalid_credentials")
    alice.password = OTHER_PASSWORD
    await alice.log_in()


async def test_a_login_with_the_old_password_does_not_outlive_its_change(
    alice: Actor, db: asyncpg.Connection, database_url: str
) -> None:
    """The login has verified the old password, and inserts its session while the new password is being committed."""
    async with db.transaction():
        await db.execute("UPDATE users SET password_hash = 'new' WHERE id = $1", alice.id)
        login = asyncio.ensure_future(alice.post("/auth/login", {"email": alice.email, "password": PASSWORD}))
        await wait_until_blocked(database_url)
    response = await login
    assert (response.status, response.code) == (401, "invalid_credentials")


async def test_passwords_count_beyond_72_bytes(http: aiohttp.ClientSession, server: str) -> None:
    long = "Aa1" + "ä" * 60  # 123 bytes
    registered = await register(http, server, password=long + "x")
    email = registered["user"]["email"]
    guest = Actor(http, server, "Nobody")
    assert (await guest.post("/auth/login", {"email": email, "password": long + "y"})).status == 401
    assert (await guest.post("/auth/login", {"email": email, "password": long})).status == 401
    assert (await guest.post("/auth/login", {"email": email.upper(), "password": long + "x"})).status == 200


async def test_account_deletion_requires_the_password_and_deletes_owned_data(alice: Actor, bob: Actor) -> None:
    phone = await alice.at(alice.base).log_in()
    own = await alice.make_project(name="Diary")
    shared = await bob.make_project(alice, name="Engine")
    wrong = await alice.delete("/auth/profile", {"password": "Wrong12345"})
    assert (wrong.status, wrong.code) == (401, "invalid_credentials")
    missing = await alice.delete("/auth/profile")
    assert (missing.status, missing["details"][0]["field"]) == (422, "password")

    deleted = await alice.delete("/auth/profile", {"password": PASSWORD})
    assert (deleted.status, deleted.body) == (204, "")
    for device in (alice, phone):
        assert (await device.get("/auth/profile")).status == 401
        assert (await device.get(f"/projects/{own}")).status == 401
        assert (await device.post("/auth/refresh", {"refreshToken": device.refresh_token})).status == 401
    login = await bob.post("/auth/login", {"email": alice.email, "password": PASSWORD})
    assert (login.status, login.code) == (401, "invalid_credentials")
    assert (await bob.get(f"/projects/{shared}"))["counts"]["collaborators"] == 1
    again = await register(alice.http, alice.base, email=alice.email)
    assert again.status == 201
    assert again["user"]["id"] != alice.id


async def test_account_that_owns_a_shared_project_cannot_be_deleted(alice: Actor, bob: Actor) -> None:
    own = await alice.make_project(name="Diary")
    shared = await alice.make_project(bob, name="Engine")
    refused = await alice.delete("/auth/profile", {"password": PASSWORD})
    assert (refused.status, refused.code) == (409, "conflict")
    assert (await alice.get(f"/projects/{own}")).status == 200
    assert (await bob.get(f"/projects/{shared}")).status == 200


async def test_member_who_joins_during_account_deletion_keeps_the_project(
    alice: Actor, bob: Actor, db: asyncpg.Connection, database_url: str
) -> None:
    project = await alice.make_project()
    async with db.transaction():
        await db.execute("INSERT INTO members (project_id, user_id, role) VALUES ($1, $2, 'VIEWER')", project, bob.id)
        deletion = asyncio.ensure_future(alice.delete("/auth/profile", {"password": PASSWORD}))
        await wait_until_blocked(database_url)
    assert (await deletion).status == 409
    assert (await bob.get(f"/projects/{project}")).status == 200


async def test_an_account_whose_password_has_just_been_changed_is_not_deleted_with_the_old_one(
    alice: Actor, db: asyncpg.Connection, database_url: str
) -> None:
    async with db.transaction():
        await db.execute("UPDATE users SET password_hash = 'new' WHERE id = $1", alice.id)
        deletion = asyncio.ensure_future(alice.delete("/auth/profile", {"password": PASSWORD}))
        await wait_until_blocked(database_url)
    response = await deletion
    assert (response.status, response.code) == (401, "invalid_credentials")


async def test_an_older_revision_of_an_account_is_not_deleted(alice: Actor) -> None:
    tag = (await alice.get("/auth/profile")).headers["ETag"]
    await alice.patch("/auth/profile", {"name": "Alice II"})
    stale = await alice.delete("/auth/profile", {"password": PASSWORD}, headers={"If-Match": tag})
    assert (stale.status, stale.code) == (412, "precondition_failed")
    assert (await alice.get("/auth/profile")).status == 200


async def test_registration_with_an_invitation_joins_the_project(alice: Actor, db: asyncpg.Connection) -> None:
    project = await alice.make_project()
    newcomer = Actor(alice.http, alice.base, "Newcomer")
    token = await invite(db, alice, project, newcomer.email, expires_in=timedelta(days=1))
    body = {"email": newcomer.email.upper(), "password": PASSWORD, "name": "New Comer", "invitationToken": token}
    newcomer.access_token = (await newcomer.post("/auth/register", body))["accessToken"]
    assert (await newcomer.get(f"/projects/{project}"))["role"] == "VIEWER"


async def test_an_invitation_is_accepted_with_its_token_only(alice: Actor, db: asyncpg.Connection) -> None:
    project = await alice.make_project()
    newcomer = Actor(alice.http, alice.base, "Newcomer")
    await invite(db, alice, project, newcomer.email, expires_in=timedelta(days=1))
    await newcomer.register()
    assert (await newcomer.get(f"/projects/{project}")).status == 404


@pytest.mark.parametrize(
    ("flaw", "status", "code"), [("unknown", 404, "not_found"), ("expired", 410, "gone"), ("other's", 403, "forbidden")]
)
async def test_bad_invitation_creates_no_account(
    flaw: str, status: int, code: str, alice: Actor, db: asyncpg.Connection
) -> None:
    project = await alice.make_project()
    newcomer = Actor(alice.http, alice.base, "Newcomer")
    email = f"other-{newcomer.email}" if flaw == "other's" else newcomer.email
    token = await invite(db, alice, project, email, expires_in=timedelta(hours=-1 if flaw == "expired" else 1))
    body = {"email": newcomer.email, "password": PASSWORD, "name": "New Comer"}
    invitation_token = "unknown" if flaw == "unknown" else token
    refused = await newcomer.post("/auth/register", body | {"invitationToken": invitation_token})
    assert (refused.status, refused.code) == (status, code)
    await newcomer.register()  # the address is still free


async def test_signed_in_user_without_an_account_is_rejected(make_actor: MakeActor, server: str) -> None:
    """Another device has just deleted the account."""
    actor = await make_actor("Ghost", server)
    assert (await actor.delete("/auth/profile", {"password": PASSWORD})).status == 204
    for response in (await actor.patch("/auth/profile", {"name": "Back"}), await actor.get("/auth/sessions")):
        assert (response.status, response.code) == (401, "unauthenticated")


async def wait_until_blocked(database_url: str, *, statements: int = 1) -> None:
    """Wait until so many statements wait for a lock that the test holds."""
    watcher = await asyncpg.connect(database_url)
    try:
        async with asyncio.timeout(WAIT_TIMEOUT_SECONDS):
            while await watcher.fetchval(BLOCKED) < statements:
                await asyncio.sleep(0.01)
    finally:
        await watcher.close()


BLOCKED = "SELECT count(*) FROM pg_stat_activity WHERE wait_event_type = 'Lock' AND datname = current_database()"
