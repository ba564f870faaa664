"""Faults of identity that users found: equal email addresses, blank names, passwords that depend on the keyboard."""

import asyncio
import base64
import hashlib
import hmac
import re
import shutil
import unicodedata
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any
from uuid import uuid4

import aiohttp
import asyncpg
import bcrypt
import psycopg
import pytest

from server import backfill, migrations
from server.auth import passwords
from server.projects.invitations import token_hash
from tests.actors import PASSWORD, Actor, Response
from tests.conftest import MakeActor, MakeServer
from tests.processes import Processes

KELVIN, DOTTED_I = "\u212a", "\u0130"  # lower() of PostgreSQL and Python makes "k" and "i…" of them
INVISIBLE_NAMES = {
    "spaces": "   ",
    "no-break spaces": "\u00a0\u00a0\u2003",
    "zero-width": "\u200b\u200d\ufeff",
    "bidi controls": "\u202e\u2066\u2069",
    "tags": "\U000e0041\U000e0042",
    "Hangul fillers": "\u3164\u115f\uffa0",
    "blank Braille": "\u2800\u2800",
    "combining only": "\u0301\u0308",
}
LINE_BREAKING_NAMES = {
    "newline": "Ada\nLovelace",
    "escape": "Ada\x1b[31m",
    "delete": "Ada\x7f",
    "C1": "Ada\x9bm",
    "line separator": "Ada\u2028Lovelace",
    "paragraph separator": "Ada\u2029Lovelace",
}
VISIBLE_NAMES = {
    "emoji sequence": "👩‍👩‍👧‍👦 family",
    "right to left": "\u202eabc\u2066",
    "Arabic": "عادة",
    "combining": "e\u0301e\u0301",
}


def random_word() -> str:
    return uuid4().hex[:12]


async def register(http: aiohttp.ClientSession, base: str, **body: Any) -> Response:
    newcomer = Actor(http, base, "Newcomer")
    return await newcomer.post("/auth/register", {"email": newcomer.email, "password": PASSWORD, "name": "New"} | body)


async def log_in(http: aiohttp.ClientSession, base: str, email: str, password: str = PASSWORD) -> Response:
    return await Actor(http, base, "Guest").post("/auth/login", {"email": email, "password": password})


@pytest.fixture
async def db(database_url: str) -> AsyncIterator[asyncpg.Connection]:
    connection = await asyncpg.connect(database_url)
    yield connection
    await connection.close()


def fields_of(refused: Response) -> set[str]:
    assert (refused.status, refused.code) == (422, "validation_failed"), refused
    return {problem["field"] for problem in refused["details"]}


# Addresses


@pytest.mark.parametrize(
    "address",
    [
        f"mi{KELVIN}e-{{}}@kix.example",
        f"{DOTTED_I}van-{{}}@kix.example",
        "jürgen-{}@example.org",
        unicodedata.normalize("NFD", "jürgen-{}@example.org"),
        "аda-{}@example.org",  # Cyrillic
    ],
    ids=ascii,
)
async def test_an_address_that_looks_like_another_address_cannot_be_registered(
    address: str, http: aiohttp.ClientSession, server: str
) -> None:
    assert fields_of(await register(http, server, email=address.format(random_word()))) == {"email"}


@pytest.mark.parametrize("place", ["ada\u200b-{}@example.org", "ada-{}@exam\u200bple.org", "ada-{}@example.org\u200b"])
async def test_an_address_with_a_zero_width_character_cannot_be_registered(
    place: str, http: aiohttp.ClientSession, server: str
) -> None:
    assert fields_of(await register(http, server, email=place.format(random_word()))) == {"email"}


async def test_spellings_of_one_domain_are_one_account(http: aiohttp.ClientSession, server: str) -> None:
    local = random_word()
    spellings = spellings_of(local)
    created = await register(http, server, email=spellings[0])
    assert (created.status, created["user"]["email"]) == (201, f"{local}@xn--bcher-kva.example")
    for spelling in spellings:
        repeated = await register(http, server, email=spelling)
        assert (repeated.status, repeated.code) == (409, "email_taken"), ascii(spelling)
        signed_in = await log_in(http, server, spelling)
        assert (signed_in.status, signed_in["user"]["id"]) == (200, created["user"]["id"]), ascii(spelling)


def spellings_of(local: str) -> list[str]:
    """Return the spellings of one address of an internationalized domain, as keyboards and programs write it."""
    return [
        f"{local}@bücher.example",
        f"{local}@{unicodedata.normalize('NFD', 'bücher')}.example",
        f"{local}@BÜCHER.example",
        f"{local.upper()}@bücher。example",
        f"{local}@xn--bcher-kva.example",
        f"{local}@XN--BCHER-KVA.EXAMPLE",
    ]


async def test_the_local_part_is_stored_as_typed_and_compared_in_lower_case(
    http: aiohttp.ClientSession, server: str
) -> None:
    local = f"Ada.{random_word()}"
    created = await register(http, server, email=f"{local}@Example.ORG")
    assert created["user"]["email"] == f"{local}@example.org"
    assert (await register(http, server, email=f"{local.lower()}@example.org")).code == "email_taken"
    assert (await log_in(http, server, f"{local.upper()}@EXAMPLE.org")).status == 200


async def test_exactly_one_of_concurrent_registrations_of_an_address_succeeds(
    http: aiohttp.ClientSession, server: str
) -> None:
    spellings = spellings_of(random_word()) * 3
    answers = await asyncio.gather(*(register(http, server, email=spelling) for spelling in spellings))
    assert sorted(answer.status for answer in answers) == [201] + [409] * (len(spellings) - 1)


async def test_a_local_part_that_no_mail_server_accepts_is_refused(http: aiohttp.ClientSession, server: str) -> None:
    local = (random_word() + "a" * 64)[:64]
    assert fields_of(await register(http, server, email=f"{local}a@example.org")) == {"email"}
    assert (await register(http, server, email=f"{local}@example.org")).status == 201


async def test_white_space_around_an_address_is_ignored(alice: Actor) -> None:
    newcomer = Actor(alice.http, alice.base, "New")
    created = await register(alice.http, alice.base, email=f"  {newcomer.email} \n")
    assert (created.status, created["user"]["email"]) == (201, newcomer.email)
    assert (await log_in(alice.http, alice.base, f"{newcomer.email}\t")).status == 200
    project = await alice.make_project()
    added = await alice.post(f"/projects/{project}/collaborators", {"email": f" {newcomer.email} "})
    assert (added.status, added["collaborator"]["user"]["email"]) == (201, newcomer.email)


@pytest.mark.parametrize("domain", ["example.org", "corp.example", "corp.local", "team.test", "intranet.internal"])
async def test_an_address_of_a_private_network_can_be_registered(
    domain: str, http: aiohttp.ClientSession, server: str
) -> None:
    assert (await register(http, server, email=f"{random_word()}@{domain}")).status == 201


async def test_an_invitation_reaches_the_account_under_any_spelling_of_its_address(
    alice: Actor, http: aiohttp.ClientSession
) -> None:
    spellings, project = spellings_of(random_word()), await alice.make_project()
    path = f"/projects/{project}/collaborators"
    invited = [(await alice.post(path, {"email": spelling}))["invitation"] for spelling in spellings]
    assert len({invitation["id"] for invitation in invited}) == 1  # each renews the previous one
    assert {invitation["email"] for invitation in invited[:3]} == {spellings[4]}
    newcomer = Actor(http, alice.base, "New")
    newcomer.access_token = (await register(http, alice.base, email=spellings[4]))["accessToken"]
    assert [invitation["projectId"] for invitation in (await newcomer.get("/invitations"))["items"]] == [project]
    accepted = await newcomer.post("/invitations/accept", {"token": invited[-1]["token"]})
    assert (accepted.status, accepted["id"]) == (200, project)
    repeated = await alice.post(path, {"email": spellings[0]})
    assert (repeated.status, repeated.code) == (409, "already_collaborator")


async def test_adding_a_member_consumes_the_invitation_under_any_spelling(
    alice: Actor, http: aiohttp.ClientSession
) -> None:
    spellings, project = spellings_of(random_word()), await alice.make_project()
    path = f"/projects/{project}/collaborators"
    assert "invitation" in (await alice.post(path, {"email": spellings[4]})).body
    assert (await register(http, alice.base, email=spellings[2])).status == 201
    assert "collaborator" in (await alice.post(path, {"email": spellings[0]})).body
    assert (await alice.get(f"/projects/{project}/invitations"))["items"] == []


async def test_an_address_that_cannot_be_registered_cannot_be_invited(alice: Actor) -> None:
    project = await alice.make_project()
    for address in (f"mi{KELVIN}e@kix.example", "no-address", "", "x@exam\u200bple.org", "a" * 65 + "@example.org"):
        refused = await alice.post(f"/projects/{project}/collaborators", {"email": address})
        assert fields_of(refused) == {"email"}, ascii(address)


# Accounts from before these rules


@pytest.fixture
def old_database_url(empty_database_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Return a database with the migrations of the previous version only."""
    folder = tmp_path / "migrations"
    folder.mkdir()
    for path in migrations.MIGRATIONS_DIR.glob("000[1-6].*"):
        shutil.copy(path, folder)
    with monkeypatch.context() as before:
        before.setattr(migrations, "MIGRATIONS_DIR", folder)
        migrations.apply(empty_database_url)
    return empty_database_url


OLD_HASH_ROUNDS = 4


def old_hash(password: str) -> str:
    """Return the hash of a password as an older version made it: without normalization."""
    digest = base64.b64encode(hmac.digest(passwords.HMAC_LABEL, password.encode(), hashlib.sha256))
    return bcrypt.hashpw(digest, bcrypt.gensalt(OLD_HASH_ROUNDS)).decode()


def insert_accounts(url: str, *emails: str) -> dict[str, str]:
    """Insert accounts with these addresses, the oldest first; return their ids by address."""
    hashed = old_hash(PASSWORD)
    with psycopg.connect(url) as connection:
        rows = [
            connection.execute(
                """
                INSERT INTO users (email, name, password_hash, created_at)
                VALUES (%s, 'Old', %s, now() - make_interval(days => 100 - %s)) RETURNING email, id::text
                """,
                (email, hashed, age),
            ).fetchone()
            for age, email in enumerate(emails)
        ]
    return dict(row for row in rows if row is not None)


async def upgrade(url: str) -> list[str]:
    """Migrate as ``run.py migrate`` does; return its messages about accounts."""
    await asyncio.to_thread(migrations.apply, url)
    return await backfill.run(url)


def migrate(processes: Processes, url: str) -> str:
    process = processes.command("migrate", DATABASE_URL=url)
    assert process.wait() == 0, process.output
    return process.output


def keys_in(url: str) -> dict[str, str | None]:
    with psycopg.connect(url) as connection:
        return dict(connection.execute("SELECT email, email_key FROM users ORDER BY created_at").fetchall())


async def test_an_upgrade_keeps_every_account_and_lists_colliding_accounts(
    old_database_url: str, processes: Processes, make_server: MakeServer, http: aiohttp.ClientSession
) -> None:
    ids = insert_accounts(
        old_database_url,
        "Ada@Example.org",
        "x@bücher.example",  # older than its twin
        "x@xn--bcher-kva.example",
        "y@xn--bcher-kva.example",  # older than its twins
        "Y@BÜCHER.example",
        f"y@{unicodedata.normalize('NFD', 'bücher')}.example",
        "jürgen@example.org",
        "z@☃.example",  # no valid domain of IDNA 2008
        "me@localhost",
        '"quoted name"@example.org',
        "l" * 70 + "@example.org",
    )
    output = migrate(processes, old_database_url)
    losers = ["x@xn--bcher-kva.example", "Y@BÜCHER.example", f"y@{unicodedata.normalize('NFD', 'bücher')}.example"]
    keys = keys_in(old_database_url)
    assert [email for email, key in keys.items() if key is None] == losers
    assert keys["Ada@Example.org"] == "ada@example.org"
    assert keys["x@bücher.example"] == "x@xn--bcher-kva.example"
    assert keys["y@xn--bcher-kva.example"] == "y@xn--bcher-kva.example"
    listed = re.findall(r"^without a key: (\S+) (.*)$", output, re.MULTILINE)
    assert [id for id, _ in listed] == [ids[email] for email in losers]
    assert all(ascii(email).strip("'") in text for email, (_, text) in zip(losers, listed, strict=True))

    server = await make_server(database_url=old_database_url)
    for email, id in ids.items():
        signed_in = await log_in(http, server, f" {email} ")
        assert (signed_in.status, signed_in["user"]["id"], signed_in["user"]["email"]) == (200, id, email)
    for email, owner in (
        ("ADA@EXAMPLE.ORG", "Ada@Example.org"),
        ("X@BÜCHER.example", "x@bücher.example"),
        ("ME@localhost", "me@localhost"),
        ("Jürgen@example.org", "jürgen@example.org"),
    ):
        assert (await log_in(http, server, email))["user"]["id"] == ids[owner]

    assert migrate(processes, old_database_url).partition("\n")[0] == "no migrations to apply"
    assert keys_in(old_database_url) == keys


async def test_an_old_look_alike_is_not_the_address_that_it_imitates(
    old_database_url: str, make_server: MakeServer, make_actor: MakeActor
) -> None:
    look_alikes = [f"mi{KELVIN}e@kix.example", f"{DOTTED_I}van@kix.example"]
    ids = insert_accounts(old_database_url, *look_alikes)
    await upgrade(old_database_url)
    server = await make_server(database_url=old_database_url)
    owner = await make_actor("Owner", server)
    path = f"/projects/{await owner.make_project()}/collaborators"
    for email in ("mike@kix.example", "ivan@kix.example"):
        assert (await owner.post(path, {"email": email}))["invitation"]["email"] == email
        assert (await log_in(owner.http, server, email)).status == 401
        assert (await register(owner.http, server, email=email)).status == 201
    for email in look_alikes:  # they remain accounts, under their own spelling
        added = await owner.post(path, {"email": email})
        assert (added.status, added["collaborator"]["user"]["id"]) == (201, ids[email])


async def test_an_upgrade_keeps_pending_invitations(
    old_database_url: str, make_server: MakeServer, make_actor: MakeActor
) -> None:
    invited = ["Ada@Example.org", "x@bücher.example", "jürgen@example.org"]
    accounts = ["ada@example.org", "x@xn--bcher-kva.example", "jürgen@example.org"]
    insert_accounts(old_database_url, *accounts)
    with psycopg.connect(old_database_url) as connection:
        (project,) = connection.execute("INSERT INTO projects (name) VALUES ('Old') RETURNING id::text").fetchone()
        owner = connection.execute("SELECT id FROM users ORDER BY created_at LIMIT 1").fetchone()[0]
        connection.execute(
            "INSERT INTO members (project_id, user_id, role) SELECT %s, id, 'OWNER' FROM users WHERE id = %s",
            (project, owner),
        )
        for email in invited:
            connection.execute(
                """
                INSERT INTO invitations (project_id, email, role, token_hash, expires_at)
                VALUES (%s, %s, 'VIEWER', %s, now() + interval '1 day')
                """,
                (project, email, token_hash(f"token of {email}")),
            )
    await upgrade(old_database_url)
    server = await make_server(database_url=old_database_url)
    guest = await make_actor("Guest", server)
    for email, account in zip(invited, accounts, strict=True):
        user = Actor(guest.http, server, "Old")
        user.access_token = (await log_in(guest.http, server, account))["accessToken"]
        assert [invitation["projectId"] for invitation in (await user.get("/invitations"))["items"]] == [project]
        assert (await user.post("/invitations/accept", {"token": f"token of {email}"})).status == 200


async def test_a_server_of_the_previous_version_keeps_working_during_the_upgrade(
    old_database_url: str, make_server: MakeServer, http: aiohttp.ClientSession
) -> None:
    """The statements are exact copies from that version."""
    await upgrade(old_database_url)
    create = """
        INSERT INTO users (email, name, password_hash) VALUES ($1, $2, $3)
        ON CONFLICT (lower(email)) DO NOTHING
        RETURNING id
        """
    invite = """
        INSERT INTO invitations (project_id, email, role, token_hash, expires_at)
        VALUES ($1, $2, 'VIEWER', $3, now() + interval '1 day')
        ON CONFLICT (project_id, lower(email)) DO UPDATE SET token_hash = EXCLUDED.token_hash
        RETURNING id
        """
    db = await asyncpg.connect(old_database_url)
    try:
        assert await db.fetchval(create, "Ada@Example.org", "Ada", old_hash(PASSWORD))
        assert await db.fetchval(create, "ada@example.ORG", "Ada", "x") is None
        assert await db.fetchval("SELECT name FROM users WHERE lower(email) = lower($1)", "ADA@example.org") == "Ada"
        project = await db.fetchval("INSERT INTO projects (name) VALUES ('Old') RETURNING id")
        first = await db.fetchval(invite, project, "Bob@Example.org", token_hash("1"))
        assert await db.fetchval(invite, project, "bob@example.org", token_hash("2")) == first
    finally:
        await db.close()
    server = await make_server(database_url=old_database_url)
    assert (await log_in(http, server, "ada@example.org")).status == 200
    assert (await register(http, server, email="ada@example.org")).code == "email_taken"
    joining = {"email": "bob@example.org", "invitationToken": "2"}
    assert (await register(http, server, **joining)).status == 201


async def test_the_next_upgrade_gives_the_key_of_a_deleted_account_to_its_twin(
    old_database_url: str, make_server: MakeServer, http: aiohttp.ClientSession
) -> None:
    ids = insert_accounts(old_database_url, "x@bücher.example", "x@xn--bcher-kva.example")
    (line,) = await upgrade(old_database_url)
    assert ids["x@xn--bcher-kva.example"] in line
    with psycopg.connect(old_database_url) as connection:
        connection.execute("DELETE FROM users WHERE id = %s", (ids["x@bücher.example"],))
    server = await make_server(database_url=old_database_url)
    refused = await register(http, server, email="x@bücher.example")  # the spelling of the account without a key
    assert (refused.status, refused.code) == (409, "email_taken")
    assert await upgrade(old_database_url) == []
    assert keys_in(old_database_url) == {"x@xn--bcher-kva.example": "x@xn--bcher-kva.example"}


# Names


async def set_name(actor: Actor, kind: str, name: str) -> Response:
    if kind == "user":
        return await actor.patch("/auth/profile", {"name": name})
    if kind == "registration":
        return await register(actor.http, actor.base, name=name)
    if kind == "project":
        return await actor.post("/projects", {"name": name})
    return await actor.post("/workspaces", {"projectId": await actor.make_project(), "name": name})


@pytest.mark.parametrize("kind", ["user", "registration", "project", "workspace"])
async def test_an_invisible_name_or_a_name_with_line_breaks_is_refused(kind: str, alice: Actor) -> None:
    for case, name in (INVISIBLE_NAMES | LINE_BREAKING_NAMES).items():
        assert fields_of(await set_name(alice, kind, name)) == {"name"}, case


@pytest.mark.parametrize("kind", ["user", "registration", "project", "workspace"])
async def test_a_name_is_trimmed_and_otherwise_stored_as_sent(kind: str, alice: Actor) -> None:
    for case, name in VISIBLE_NAMES.items():
        response = await set_name(alice, kind, f" \n{name}\u00a0")
        resource = response["user"] if kind == "registration" else response
        assert resource["name"] == name, case
    assert fields_of(await set_name(alice, kind, " " * 200)) == {"name"}
    assert fields_of(await set_name(alice, kind, f" {'a' * 101} ")) == {"name"}
    assert (await set_name(alice, kind, f"{' ' * 200}{'a' * 100}")).status in (200, 201)


async def test_a_user_name_of_one_letter_and_a_space_is_too_short(alice: Actor) -> None:
    assert fields_of(await set_name(alice, "user", "A ")) == {"name"}


# Passwords


NFC, NFD = (unicodedata.normalize(form, "Schlüßel-Ångström-1815") for form in ("NFC", "NFD"))


async def test_a_password_matches_from_every_keyboard(http: aiohttp.ClientSession, server: str) -> None:
    for registered, typed in ((NFC, NFD), (NFD, NFC), ("Full-width-１８１５", "Full-width-1815")):
        email = (await register(http, server, password=registered))["user"]["email"]
        assert (await log_in(http, server, email, typed)).status == 200
        assert (await log_in(http, server, email, registered)).status == 200
        assert (await log_in(http, server, email, f"{typed}x")).status == 401


async def test_a_password_can_be_confirmed_and_changed_from_every_keyboard(alice: Actor) -> None:
    changed = await alice.post("/auth/password", {"currentPassword": PASSWORD, "newPassword": NFD})
    assert changed.status == 204
    repeated = await alice.post("/auth/password", {"currentPassword": NFC, "newPassword": f"{NFC}-2"})
    assert repeated.status == 204
    wrong = await alice.delete("/auth/profile", {"password": NFD})
    assert (wrong.status, wrong.code) == (401, "invalid_credentials")
    assert (await alice.delete("/auth/profile", {"password": f"{NFD}-2"})).status == 204


async def test_an_older_hash_of_a_password_as_it_was_sent_matches_and_is_replaced(
    alice: Actor, db: asyncpg.Connection
) -> None:
    hashed = old_hash(NFD)
    await db.execute("UPDATE users SET password_hash = $2 WHERE id = $1", alice.id, hashed)
    assert (await log_in(alice.http, alice.base, alice.email, f"{NFD}x")).status == 401
    assert await db.fetchval("SELECT password_hash FROM users WHERE id = $1", alice.id) == hashed
    assert (await log_in(alice.http, alice.base, alice.email, NFD)).status == 200
    renewed = await db.fetchval("SELECT password_hash FROM users WHERE id = $1", alice.id)
    assert renewed != hashed
    for typed in (NFC, NFD):
        assert (await log_in(alice.http, alice.base, alice.email, typed)).status == 200
    assert await db.fetchval("SELECT password_hash FROM users WHERE id = $1", alice.id) == renewed


async def test_an_older_password_may_be_confirmed_as_it_was_sent(alice: Actor, db: asyncpg.Connection) -> None:
    await db.execute("UPDATE users SET password_hash = $2 WHERE id = $1", alice.id, old_hash(NFD))
    changed = await alice.post("/auth/password", {"currentPassword": NFD, "newPassword": NFC})
    assert changed.status == 204


async def test_the_length_of_a_password_is_that_of_its_normalized_form(
    http: aiohttp.ClientSession, server: str
) -> None:
    longest = "Aa1" + "ΐ" * 125  # three code points each, in NFD
    decomposed = unicodedata.normalize("NFD", longest)
    email = (await register(http, server, password=decomposed))["user"]["email"]
    assert (await log_in(http, server, email, decomposed)).status == 200
    assert (await log_in(http, server, email, longest)).status == 200
    for bad in (f"{longest}x", unicodedata.normalize("NFD", "Aa1äöü"), "Aa1" + "\ufdfa" * 8, "Aa1" + "a" * 100_000):
        assert fields_of(await register(http, server, password=bad)) == {"password"}


@pytest.mark.parametrize(("typed", "hashes"), [("Wrong-12345", 1), (unicodedata.normalize("NFD", "Wröng-12345"), 2)])
async def test_an_unknown_address_costs_as_many_hashes_as_a_known_one(
    typed: str, hashes: int, alice: Actor, monkeypatch: pytest.MonkeyPatch
) -> None:
    checked: list[bytes] = []
    check: Callable[[bytes, bytes], bool] = bcrypt.checkpw

    def counting_check(password: bytes, hashed: bytes) -> bool:
        checked.append(password)
        return check(password, hashed)

    monkeypatch.setattr(bcrypt, "checkpw", counting_check)
    for email in (alice.email, f"un{alice.email}", "jürgen@example.org", "x@bücher.example", "no-address"):
        checked.clear()
        refused = await log_in(alice.http, alice.base, email, typed)
        assert (refused.status, refused.code) == (401, "invalid_credentials")
        assert len(checked) == hashes, email
