"""Passwords: slow to guess, no slower for others, told to nobody."""

import asyncio
import statistics
import subprocess
import sys
import time
from collections import Counter

import aiohttp
import asyncpg
import psycopg

from server.auth.passwords import Fit, Hasher
from tests.actors import PASSWORD, Actor
from tests.conftest import MakeServer
from tests.processes import Processes

LAG_SECONDS = 0.02


async def test_a_login_takes_as_long_for_an_unknown_address(
    make_server: MakeServer, http: aiohttp.ClientSession
) -> None:
    """By the processor time of all threads: what other processes take of the machine does not count."""
    alice = await Actor(http, await make_server(bcrypt_rounds=9), "Alice").register()
    guest = Actor(http, alice.base, "Guest")
    took: dict[str, list[float]] = {alice.email: [], f"un{alice.email}": []}
    for _ in range(15):
        for email, times in took.items():
            began = time.process_time()
            refused = await guest.post("/auth/login", {"email": email, "password": "Wrong12345"})
            times.append(time.process_time() - began)
            assert (refused.status, refused.code) == (401, "invalid_credentials")
            refused.body.pop("requestId")
            assert refused.body == refused.body | {"detail": "Email or password is wrong"}
    known, unknown = map(statistics.median, took.values())
    assert 0.6 < known / unknown < 1.6, took  # without the dummy hash unknown ones take a tenth


async def test_a_storm_of_logins_leaves_the_loop_its_turn(full: bool) -> None:
    """All cores hash, at a low priority; how late the loop's own timers come is what others feel. That depends on the
    machine, and is held in the full form; but nowhere is a hash made in the loop's thread."""
    hasher = Hasher(rounds=12)
    lags: list[float] = []
    turns: list[float] = []  # of the processor

    async def watch() -> None:
        while True:
            began, worked = time.perf_counter(), time.thread_time()
            await asyncio.sleep(0.002)
            lags.append(time.perf_counter() - began - 0.002)
            turns.append(time.thread_time() - worked)

    before = time.process_time()
    hashed = await hasher.hash(PASSWORD)
    one_hash = time.process_time() - before
    watcher = asyncio.ensure_future(watch())
    for _ in range(10 if full else 2):
        fits = await asyncio.gather(*(hasher.verify(PASSWORD, hashed) for _ in range(100)), return_exceptions=True)
        assert Fit.CURRENT in fits
    watcher.cancel()
    hasher.close()
    assert sorted(turns)[-2] < one_hash / 2  # one may have collected garbage
    p99 = statistics.quantiles(lags, n=100)[98]
    print(f"loop lag under a storm of logins: p50 {statistics.median(lags) * 1e3:.2f} ms, p99 {p99 * 1e3:.2f} ms")
    assert p99 < LAG_SECONDS or not full  # on a machine of one's own


async def test_a_storm_of_logins_at_a_running_server_leaves_others_their_turn(
    processes: Processes, http: aiohttp.ClientSession, full: bool
) -> None:
    server = processes.server(BCRYPT_ROUNDS="12")
    alice = await Actor(http, server.base, "Alice").register()
    guest = Actor(http, server.base, "Guest")
    calm = await answer_times(guest, seconds=1)
    is_over = asyncio.Event()

    async def sign_in_again_and_again() -> list[int]:
        statuses = []
        while not is_over.is_set():
            answer = await guest.post("/auth/login", {"email": alice.email, "password": PASSWORD})
            statuses.append(answer.status)
        return statuses

    storm = asyncio.gather(*(sign_in_again_and_again() for _ in range(30)))
    stormy = await answer_times(guest, seconds=15 if full else 4)
    is_over.set()
    statuses = Counter(status for each in await storm for status in each)
    assert {200} <= statuses.keys() <= {200, 503}
    # Inline, others would have their turn between two logins, each of which takes 200 ms and more.
    assert len(stormy) > 3 * statuses[200]
    quick, slow = (statistics.quantiles(times, n=100)[98] for times in (calm, stormy))
    print(f"answers without stores: p99 {quick * 1e3:.1f} ms; in a storm of logins {slow * 1e3:.1f} ms")
    assert slow < LAG_SECONDS or not full


async def answer_times(guest: Actor, *, seconds: float) -> list[float]:
    times, until = [], time.perf_counter() + seconds
    while (began := time.perf_counter()) < until:
        assert (await guest.get("/health")).status == 200
        times.append(time.perf_counter() - began)
        await asyncio.sleep(0.005)
    return times


async def test_secrets_are_neither_in_the_database_nor_in_the_logs(
    processes: Processes, http: aiohttp.ClientSession, database_url: str
) -> None:
    server = processes.server(LOG_LEVEL="debug")
    alice = await Actor(http, server.base, "Alice").register()
    told = [alice.password, alice.access_token, alice.refresh_token]
    fresh = (await alice.post("/auth/refresh", {"refreshToken": alice.refresh_token})).body
    told += [fresh["accessToken"], fresh["refreshToken"], (await alice.post("/auth/ws-ticket"))["ticket"]]
    project = await alice.make_project()
    invitation = await alice.post(
        f"/projects/{project}/collaborators", {"email": f"new-{alice.email}", "role": "VIEWER"}
    )
    told.append(invitation["invitation"]["token"])
    await alice.post("/auth/login", {"email": alice.email, "password": "Mistyped1815"})
    await alice.post("/auth/login", {"email": alice.email, "password": {"Mistyped1815": None}})
    await alice.get(f"/ws?ticket={told[-2]}")
    told.append("Mistyped1815")
    server.terminate()

    kept = dump(database_url) + server.output
    assert alice.id in kept  # the search would find what is there
    spellings = [spelling for secret in told for spelling in (secret, secret.encode().hex())]  # bytea is shown as hex
    assert [spelling for spelling in spellings if spelling in kept] == []


def dump(database_url: str) -> str:
    """Every row of every table, as text."""
    with psycopg.connect(database_url) as connection:
        tables = connection.execute(
            "SELECT quote_ident(table_name) FROM information_schema.tables WHERE table_schema = 'public'"
        ).fetchall()
        rows = [connection.execute(f"SELECT t::text FROM {table} t").fetchall() for (table,) in tables]
    return "\n".join(str(row[0]) for each in rows for row in each)


async def test_a_password_is_kept_as_a_bcrypt_hash(alice: Actor, database_url: str) -> None:
    db = await asyncpg.connect(database_url)
    kept = await db.fetchval("SELECT password_hash FROM users WHERE id = $1", alice.id)
    await db.close()
    assert kept.startswith("$2b$04$")


async def test_of_too_many_sign_ins_each_is_let_in_or_told_to_come_back(
    make_server: MakeServer, http: aiohttp.ClientSession
) -> None:
    """Far more than can be hashed in the time that the stores have; it is not they who are to blame."""
    alice = await Actor(http, await make_server(bcrypt_rounds=12), "Alice").register()
    guest = Actor(http, alice.base, "Guest")

    async def sign_in() -> tuple[int, str]:
        answer = await guest.post("/auth/login", {"email": alice.email, "password": PASSWORD})
        assert answer.status == 200 or int(answer.headers["Retry-After"]) > 0
        return answer.status, answer.body.get("detail", "")

    answers = await asyncio.gather(*(sign_in() for _ in range(60)))
    assert {status for status, _ in answers} == {200, 503}
    assert {detail for status, detail in answers if status == 503} == {"Too many concurrent sign-ins"}


async def test_a_login_renews_a_hash_of_another_cost(
    make_server: MakeServer, http: aiohttp.ClientSession, database_url: str
) -> None:
    alice = await Actor(http, await make_server(bcrypt_rounds=4), "Alice").register()
    dearer = alice.at(await make_server(bcrypt_rounds=5))
    connection = await asyncpg.connect(database_url)

    async def kept() -> str:
        return await connection.fetchval("SELECT password_hash FROM users WHERE id = $1", alice.id)

    try:
        refused = await dearer.post("/auth/login", {"email": alice.email, "password": "Wrong12345"})
        assert (refused.status, (await kept())[:7]) == (401, "$2b$04$")
        await dearer.log_in()
        renewed = await kept()
        assert renewed[:7] == "$2b$05$"
        await dearer.log_in()
        assert await kept() == renewed
    finally:
        await connection.close()


NICER = """
import asyncio, os
from server.auth.passwords import Hasher

os.nice(15)
if os.geteuid() == 0:
    os.setuid(65534)
hasher = Hasher(rounds=4)
print(asyncio.run(hasher.hash("Lovelace1815")))
hasher.close()
"""


def test_who_is_nicer_already_hashes_all_the_same() -> None:
    """Nobody but root may become less nice."""
    done = subprocess.run([sys.executable, "-c", NICER], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("$2b$04$")
