"""Accounts: register, profile, password, deletion, as their owners meet them."""

import asyncio
from datetime import timedelta
from typing import Any

import aiohttp
import asyncpg
import pytest

from server.projects.invitations import token_hash
from tests.actors import PASSWORD, Actor, Answer
from tests.conftest import MakeActor
from tests.patience import PATIENCE_SECONDS

USER_KEYS = {"id", "email", "name", "avatarUrl", "createdAt", "updatedAt"}
OTHER_PASSWORD = "Babbage1791"


async def register(http: aiohttp.ClientSession, base: str, **body: Any) -> Answer:
    newcomer = Actor(http, base, "Newcomer")
    return await newcomer.post(
        "/auth/register", {"email": newcomer.email, "password": PASSWORD, "name": "New Comer"} | body
    )


async def invite(db: asyncpg.Connection, owner: Actor, project: str, email: str, *, lives: timedelta) -> str:
    """A pending invitation; its token."""
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
        lives,
    )
    return token


@pytest.fixture
async def db(database_url: str) -> Any:
    connection = await asyncpg.connect(database_url)
    yield connection
    await connection.close()


async def test_registering_signs_in_and_shows_no_secret(http: aiohttp.ClientSession, server: str) -> None:
    made = await register(http, server, email=Actor(http, server, "Ada").email.title())
    assert made.status == 201
    assert made.body.keys() == {"user", "accessToken", "refreshToken", "tokenType", "expiresIn"}
    assert made["user"].keys() == USER_KEYS
    assert (made["tokenType"], made["expiresIn"]) == ("Bearer", 900)
    assert made.headers["Cache-Control"] == "no-store"
    assert made.headers["Location"] == "/api/v1/auth/profile"


async def test_of_20_registrations_of_one_address_at_once_one_wins(http: aiohttp.ClientSession, server: str) -> None:
    email = Actor(http, server, "Twin").email
    spellings = [email, email.upper(), email.title()]
    answers = await asyncio.gather(*(register(http, server, email=spellings[n % 3]) for n in range(20)))
    refused = [answer for answer in answers if answer.status != 201]
    assert len(refused) == 19
    assert {(answer.status, answer.code) for answer in refused} == {(409, "email_taken")}


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
async def test_what_does_not_fit_is_named_by_its_field(
    field: str, value: Any, http: aiohttp.ClientSession, server: str
) -> None:
    refused = await register(http, server, **{field: value})
    assert (refused.status, refused.code) == (422, "validation_failed")
    assert "\0" in str(value) or {each["field"] for each in refused["details"]} == {field}


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
async def test_nothing_else_of_a_profile_can_be_set(change: dict[str, Any], alice: Actor) -> None:
    refused = await alice.patch("/auth/profile", change)
    assert (refused.status, refused.code) == (422, "validation_failed")
    assert {each["field"] for each in refused["details"]} == change.keys()


async def test_of_50_changes_on_one_etag_one_wins(alice: Actor) -> None:
    tag = (await alice.get("/auth/profile")).headers["ETag"]
    changes = (alice.patch("/auth/profile", {"name": f"Alice {n}"}, headers={"If-Match": tag}) for n in range(50))
    statuses = [answer.status for answer in await asyncio.gather(*changes)]
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
    """The login has verified the old password, and its session is written while the new one is being committed."""
    async with db.transaction():
        await db.execute("UPDATE users SET password_hash = 'new' WHERE id = $1", alice.id)
        login = asyncio.ensure_future(alice.post("/auth/login", {"email": alice.email, "password": PASSWORD}))
        await until_blocked(database_url)
    answer = await login
    assert (answer.status, answer.code) == (401, "invalid_credentials")


async def test_passwords_count_beyond_72_bytes(http: aiohttp.ClientSession, server: str) -> None:
    long = "Aa1" + "ä" * 60  # 123 bytes
    made = await register(http, server, password=long + "x")
    email = made["user"]["email"]
    nobody = Actor(http, server, "Nobody")
    assert (await nobody.post("/auth/login", {"email": email, "password": long + "y"})).status == 401
    assert (await nobody.post("/auth/login", {"email": email, "password": long})).status == 401
    assert (await nobody.post("/auth/login", {"email": email.upper(), "password": long + "x"})).status == 200


async def test_deleting_an_account_takes_the_password_and_all_that_is_its_own(alice: Actor, bob: Actor) -> None:
    phone = await alice.at(alice.base).log_in()
    own = await alice.make_project(name="Diary")
    shared = await bob.make_project(alice, name="Engine")
    wrong = await alice.delete("/auth/profile", {"password": "Wrong12345"})
    assert (wrong.status, wrong.code) == (401, "invalid_credentials")
    missing = await alice.delete("/auth/profile")
    assert (missing.status, missing["details"][0]["field"]) == (422, "password")

    gone = await alice.delete("/auth/profile", {"password": PASSWORD})
    assert (gone.status, gone.body) == (204, "")
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


async def test_an_account_that_others_depend_on_stays(alice: Actor, bob: Actor) -> None:
    own = await alice.make_project(name="Diary")
    shared = await alice.make_project(bob, name="Engine")
    refused = await alice.delete("/auth/profile", {"password": PASSWORD})
    assert (refused.status, refused.code) == (409, "conflict")
    assert (await alice.get(f"/projects/{own}")).status == 200
    assert (await bob.get(f"/projects/{shared}")).status == 200


async def test_who_joins_while_the_account_is_being_deleted_saves_the_project(
    alice: Actor, bob: Actor, db: asyncpg.Connection, database_url: str
) -> None:
    project = await alice.make_project()
    async with db.transaction():
        await db.execute("INSERT INTO members (project_id, user_id, role) VALUES ($1, $2, 'VIEWER')", project, bob.id)
        deletion = asyncio.ensure_future(alice.delete("/auth/profile", {"password": PASSWORD}))
        await until_blocked(database_url)
    assert (await deletion).status == 409
    assert (await bob.get(f"/projects/{project}")).status == 200


async def test_an_account_whose_password_has_just_been_changed_is_not_deleted_with_the_old_one(
    alice: Actor, db: asyncpg.Connection, database_url: str
) -> None:
    async with db.transaction():
        await db.execute("UPDATE users SET password_hash = 'new' WHERE id = $1", alice.id)
        deletion = asyncio.ensure_future(alice.delete("/auth/profile", {"password": PASSWORD}))
        await until_blocked(database_url)
    answer = await deletion
    assert (answer.status, answer.code) == (401, "invalid_credentials")


async def test_an_older_revision_of_an_account_is_not_deleted(alice: Actor) -> None:
    tag = (await alice.get("/auth/profile")).headers["ETag"]
    await alice.patch("/auth/profile", {"name": "Alice II"})
    stale = await alice.delete("/auth/profile", {"password": PASSWORD}, headers={"If-Match": tag})
    assert (stale.status, stale.code) == (412, "precondition_failed")
    assert (await alice.get("/auth/profile")).status == 200


async def test_who_registers_with_an_invitation_is_in_the_project(alice: Actor, db: asyncpg.Connection) -> None:
    project = await alice.make_project()
    newcomer = Actor(alice.http, alice.base, "Newcomer")
    token = await invite(db, alice, project, newcomer.email, lives=timedelta(days=1))
    body = {"email": newcomer.email.upper(), "password": PASSWORD, "name": "New Comer", "invitationToken": token}
    newcomer.access_token = (await newcomer.post("/auth/register", body))["accessToken"]
    assert (await newcomer.get(f"/projects/{project}"))["role"] == "VIEWER"


async def test_an_invitation_is_accepted_with_its_token_only(alice: Actor, db: asyncpg.Connection) -> None:
    project = await alice.make_project()
    newcomer = Actor(alice.http, alice.base, "Newcomer")
    await invite(db, alice, project, newcomer.email, lives=timedelta(days=1))
    await newcomer.register()
    assert (await newcomer.get(f"/projects/{project}")).status == 404


@pytest.mark.parametrize(
    ("flaw", "status", "code"), [("unknown", 404, "not_found"), ("expired", 410, "gone"), ("other's", 403, "forbidden")]
)
async def test_no_account_is_made_with_a_bad_invitation(
    flaw: str, status: int, code: str, alice: Actor, db: asyncpg.Connection
) -> None:
    project = await alice.make_project()
    newcomer = Actor(alice.http, alice.base, "Newcomer")
    email = f"other-{newcomer.email}" if flaw == "other's" else newcomer.email
    token = await invite(db, alice, project, email, lives=timedelta(hours=-1 if flaw == "expired" else 1))
    body = {"email": newcomer.email, "password": PASSWORD, "name": "New Comer"}
    given = "unknown" if flaw == "unknown" else token
    refused = await newcomer.post("/auth/register", body | {"invitationToken": given})
    assert (refused.status, refused.code) == (status, code)
    await newcomer.register()  # the address is still free


async def test_a_signed_in_user_without_an_account_is_refused(make_actor: MakeActor, server: str) -> None:
    """Deleted a moment ago by another device."""
    actor = await make_actor("Ghost", server)
    assert (await actor.delete("/auth/profile", {"password": PASSWORD})).status == 204
    for answer in (await actor.patch("/auth/profile", {"name": "Back"}), await actor.get("/auth/sessions")):
        assert (answer.status, answer.code) == (401, "unauthenticated")


async def until_blocked(database_url: str, *, statements: int = 1) -> None:
    """Until so many statements wait for a lock that the test holds."""
    watcher = await asyncpg.connect(database_url)
    try:
        async with asyncio.timeout(PATIENCE_SECONDS):
            while await watcher.fetchval(BLOCKED) < statements:
                await asyncio.sleep(0.01)
    finally:
        await watcher.close()


BLOCKED = "SELECT count(*) FROM pg_stat_activity WHERE wait_event_type = 'Lock' AND datname = current_database()"
