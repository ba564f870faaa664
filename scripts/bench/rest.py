"""Measure the REST throughput of one server process against three baselines in the same run.

    .venv/bin/python scripts/bench/rest.py [--seconds 3] [--repeats 3] [--only project,profile] [--no-half-load]

The only requirement is wrk (`apt-get install wrk`). The program starts its own stores, creates data, and starts five
processes:

    bare     an aiohttp handler on uvloop that responds with a small JSON object: the cost of the framework
    select   the same handler after one SELECT by primary key, with asyncpg's default pool, as large as the server's
    unreset  the same with the server's own pool, which omits the round trip that resets SET and LISTEN
    off      `run.py server` with RATE_LIMIT_DEFAULT=off
    limited  the same with a rate limit that is never reached, so that Redis counts every request

wrk loads one process at a time, with one thread and 32 open connections that always have a request in flight, after a
warm-up of 1 s. Every round measures each process once. The figures are the medians of the rounds; `of select` and `of
unreset` are medians of the ratios within a round, so that other work on the machine affects all alike. The targets,
each printed as met or missed, are relative to `select`. `cpu ratio` is the same ratio by the process's own processor
time, which other work disturbs less. bcrypt limits login and runs on every core: its row prints the number of busy
cores, with two connections for each core.

Half load uses the same 32 connections with pauses between requests, so that they send at most half of that throughput.
The tail of the latency is meaningful only there, because at full load every request waits in a queue of 32. Half load
is also measured once a round, and the printed round is the one with the median tail.
"""

import argparse
import asyncio
import contextlib
import os
import re
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
import asyncpg
import orjson
import uvloop
from aiohttp import web
from redis.asyncio import Redis

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from server import migrations, postgres  # noqa: E402
from server.devstack.stack import Stack  # noqa: E402

CONNECTIONS = 32
WARM_UP_SECONDS = 1
LOGINS, LOGIN_SECONDS = 2 * (os.cpu_count() or 1), 10.0  # each takes a core for 0.3 s
PROJECTS = 20
BCRYPT_ROUNDS = 12  # the default
# The minimum ratio to `select`, by target and endpoint. Below it: the maximum ratio of p99 to p50 at half load.
MIN_RATIOS = {
    ("off", "profile"): 0.50,
    ("off", "project"): 0.50,
    ("off", "workspace"): 0.50,
    ("limited", "profile"): 0.35,
    ("limited", "project"): 0.35,
    ("limited", "workspace"): 0.35,
    ("off", "list of 20"): 0.30,
    ("off", "new project"): 0.30,
}
MAX_TAIL_RATIO = 5.0
MIN_BUSY_CORES = 0.9  # of all, busy with logins
CREDENTIALS = {"email": "ada@example.org", "password": "Lovelace1815", "name": "Ada"}
WRK_SCRIPT = """
wrk.method, wrk.body = "%(method)s", %(body)s
wrk.headers["Content-Type"] = "application/json"
wrk.headers["Authorization"] = "Bearer %(token)s"
local pause = %(pause)f
if pause > 0 then
    function delay() return math.random() * 2 * pause end
end
function done(summary, latency)
    local errors = summary.errors
    local failed = errors.connect + errors.read + errors.write + errors.status + errors.timeout
    io.write(string.format("measured %%d %%d %%d %%d %%d\\n", summary.requests, summary.duration, failed,
        latency:percentile(50), latency:percentile(99)))
end
"""


@dataclass(frozen=True)
class Endpoint:
    name: str
    path: str
    method: str = "GET"
    body: Any = None
    token: str = ""
    connections: int = CONNECTIONS
    min_seconds: float = 0.0


@dataclass(frozen=True)
class Target:
    """A process under test."""

    name: str
    port: int
    pid: int

    def cpu(self) -> float:
        fields = Path(f"/proc/{self.pid}/stat").read_text().rsplit(")", 1)[1].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True)
class Measurement:
    rate: float  # answers per second
    per_cpu: float  # answers per second of the process's own processor time
    cores: float
    p50: float  # milliseconds
    p99: float


@dataclass
class Row:
    target: Target
    endpoint: Endpoint
    rounds: list[Measurement] = field(default_factory=list)
    halves: list[Measurement] = field(default_factory=list)

    def median(self, name: str) -> float:
        return statistics.median(getattr(measured, name) for measured in self.rounds)

    @property
    def half(self) -> Measurement | None:
        """Return the measurement at half load with the median ratio of p99 to p50, or None."""
        if not self.halves:
            return None
        return sorted(self.halves, key=lambda measured: measured.p99 / measured.p50)[len(self.halves) // 2]

    def ratio(self, baseline: "Row", name: str) -> float:
        pairs = zip(self.rounds, baseline.rounds, strict=True)
        return statistics.median(getattr(own, name) / getattr(reference, name) for own, reference in pairs)


def load(target: Target, endpoint: Endpoint, seconds: float, *, rate: float | None = None) -> Measurement:
    """Load an endpoint with wrk; ``rate`` limits the requests per second by pauses of the connections."""
    cycle = 1000 * endpoint.connections / rate if rate else 0.0
    text = WRK_SCRIPT % {
        "method": endpoint.method,
        "body": "nil" if endpoint.body is None else f"[==[{orjson.dumps(endpoint.body).decode()}]==]",
        "token": endpoint.token,
        "pause": cycle,
    }
    with tempfile.NamedTemporaryFile("w", suffix=".lua") as script:
        script.write(text)
        script.flush()
        command = ["wrk", "-t1", f"-c{endpoint.connections}", "--timeout", "30s", "-s", script.name]
        url = f"http://127.0.0.1:{target.port}{endpoint.path}"
        cpu_before = target.cpu()
        command += [f"-d{max(seconds, endpoint.min_seconds):g}s", url]
        completed = subprocess.run(command, capture_output=True, text=True, check=True)
        cpu_used = target.cpu() - cpu_before
    match = re.search(r"measured (\d+) (\d+) (\d+) (\d+) (\d+)", completed.stdout)
    assert match is not None, completed.stdout
    requests, duration, failed, p50, p99 = map(int, match.groups())
    if failed or not requests:
        raise SystemExit(f"{target.name} {endpoint.name}: {failed} of {requests} failed\n{completed.stdout}")
    elapsed = duration / 1e6
    return Measurement(requests / elapsed, requests / max(cpu_used, 0.01), cpu_used / elapsed, p50 / 1000, p99 / 1000)


async def create_fixtures(base: str) -> list[Endpoint]:
    """Create a user with PROJECTS projects and a workspace, and one who creates projects; return the endpoints."""
    api = "/api/v1"
    async with aiohttp.ClientSession(base) as http:

        async def post(path: str, body: Any, token: str = "") -> Any:
            headers = {"Authorization": f"Bearer {token}"} if token else {}
            async with http.post(api + path, json=body, headers=headers) as answer:
                assert answer.status == 201, await answer.text()
                return await answer.json()

        token = (await post("/auth/register", CREDENTIALS))["accessToken"]
        creator = (await post("/auth/register", {**CREDENTIALS, "email": "maker@example.org"}))["accessToken"]
        # A separate user for logins, because a login of a user with many sessions ends the oldest one.
        credentials = {"email": "often@example.org", "password": CREDENTIALS["password"]}
        await post("/auth/register", {**CREDENTIALS, **credentials})
        projects = [await post("/projects", {"name": f"Project {number}"}, token) for number in range(PROJECTS)]
        project = projects[0]["id"]
        workspace = (await post("/workspaces", {"projectId": project, "name": "Room"}, token))["id"]
    new_project = {"name": "Made", "description": "by the bench"}
    return [
        Endpoint("health", "/health"),
        Endpoint("login", f"{api}/auth/login", "POST", credentials, "", LOGINS, LOGIN_SECONDS),
        Endpoint("profile", f"{api}/auth/profile", token=token),
        Endpoint("project", f"{api}/projects/{project}", token=token),
        Endpoint("list of 20", f"{api}/projects?limit={PROJECTS}", token=token),
        Endpoint("new project", f"{api}/projects", "POST", new_project, creator),
        Endpoint("workspace", f"{api}/workspaces/{workspace}", token=token),
    ]


async def backdate_redis(redis_url: str) -> None:
    """Make Redis look long-running, because a server reads the session's row on every request until then."""
    redis = Redis.from_url(redis_url)
    await redis.set("{auth}:remembers-since", 1)
    await redis.aclose()


@contextlib.contextmanager
def server(name: str, stack: Stack, folder: Path, **settings: str) -> Iterator[Target]:
    log = folder / f"{name}.log"
    overrides = {
        "APP_ENV": "test",
        "HOST": "127.0.0.1",
        "PORT": "0",
        "LOG_LEVEL": "info",
        "LOG_FORMAT": "json",
        "ACCESS_TOKEN_TTL": "1h",
        "BCRYPT_ROUNDS": str(BCRYPT_ROUNDS),
        "RATE_LIMIT_AUTH": "off",
        "RATE_LIMIT_REFRESH": "off",
        "RATE_LIMIT_ACCOUNT": "off",
        **settings,
    }
    environment = {**os.environ, **stack.environment, **overrides}
    with log.open("wb") as output:
        process = subprocess.Popen(
            [sys.executable, str(ROOT / "run.py"), "server"], env=environment, stdout=output, stderr=output
        )
    try:
        yield Target(name, int(wait_for_log(log, r'"address":"http://127.0.0.1:(\d+)"')), process.pid)
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait()


def wait_for_log(log: Path, pattern: str) -> str:
    for _ in range(300):
        if match := re.search(pattern, log.read_text()):
            return match.group(1)
        time.sleep(0.1)
    raise SystemExit(log.read_text())


@contextlib.contextmanager
def baseline(name: str, database_url: str) -> Iterator[Target]:
    command = [sys.executable, __file__, "--serve-baseline", name, database_url]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            yield Target(name, int(process.stdout.readline()), process.pid)
        finally:
            process.kill()


async def serve_baseline(name: str, database_url: str) -> None:
    if name == "unreset":
        pool = (await postgres.connect(database_url)).pool
    else:
        pool = await asyncpg.create_pool(database_url, min_size=1, max_size=postgres.MAX_POOL_SIZE)

    async def bare(_: web.Request) -> web.Response:
        return web.Response(body=orjson.dumps({"status": "ok"}), content_type="application/json")

    async def select(request: web.Request) -> web.Response:
        row = await pool.fetchrow("SELECT id, name FROM users WHERE id = $1", request.match_info["id"])
        body = orjson.dumps({"id": str(row["id"]), "name": row["name"]})
        return web.Response(body=body, content_type="application/json")

    app = web.Application()
    app.router.add_get("/bare", bare)
    app.router.add_get("/select/{id}", select)
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    print(runner.addresses[0][1], flush=True)
    await asyncio.Event().wait()


async def any_user_id(database_url: str) -> str:
    connection = await asyncpg.connect(database_url)
    try:
        return str(await connection.fetchval("SELECT id FROM users LIMIT 1"))
    finally:
        await connection.close()


def measure(rows: list[Row], options: argparse.Namespace) -> None:
    for number in range(options.repeats):
        for row in rows:
            load(row.target, row.endpoint, WARM_UP_SECONDS)
            row.rounds.append(load(row.target, row.endpoint, options.seconds))
            print_progress(f"round {number + 1}: {row.target.name} {row.endpoint.name} {row.rounds[-1].rate:,.0f}/s")
    for number in range(options.repeats if options.half_load else 0):
        for row in rows:
            row.halves.append(load(row.target, row.endpoint, options.seconds, rate=row.median("rate") / 2))
            print_progress(f"half load, round {number + 1}: {row.target.name} {row.endpoint.name}")


def print_progress(text: str) -> None:
    print(f"\r\033[K{text}", end="", file=sys.stderr, flush=True)


def print_results(rows: list[Row]) -> None:
    print_progress("")
    select, unreset = (next(row for row in rows if row.target.name == name) for name in ("select", "unreset"))
    print(f"login with BCRYPT_ROUNDS={BCRYPT_ROUNDS}, on {os.cpu_count()} cores")
    heads = ("answers/s", "of select", "of unreset", "cpu ratio", "cores")
    tails = ("p50 ms", "p99 ms", "half: /s", "p50", "p99", "×")
    print(("{:8} {:12}" + " {:>10}" * 5 + " {:>8}" * 6).format("", "", *heads, *tails))
    for row in rows:
        half = row.half
        tail = (f"{half.rate:,.0f}", f"{half.p50:.1f}", f"{half.p99:.1f}", f"{half.p99 / half.p50:.1f}") if half else ()
        cells = (
            f"{row.median('rate'):,.0f}",
            f"{row.ratio(select, 'rate'):.0%}",
            f"{row.ratio(unreset, 'rate'):.0%}",
            f"{row.ratio(select, 'per_cpu'):.0%}",
            f"{row.median('cores'):.2f}",
            f"{row.median('p50'):.1f}",
            f"{row.median('p99'):.1f}",
            *tail,
        )
        text = f"{row.target.name:8} {row.endpoint.name:12}"
        text += "".join(f" {cell:>10}" for cell in cells[:5]) + "".join(f" {cell:>8}" for cell in cells[5:])
        print(text)
    for aim in check_targets(rows, select):
        print(aim)


def check_targets(rows: list[Row], least: Row) -> Iterator[str]:
    """Yield one line for each target: met or missed, the measured value, and the target."""
    for row in rows:
        name = f"{row.target.name} {row.endpoint.name}"
        if (target := MIN_RATIOS.get((row.target.name, row.endpoint.name))) is not None:
            ratio = row.ratio(least, "rate")
            yield f"{_met(ratio >= target)} {name}: {ratio:.0%} of select, target {target:.0%}"
        if row.endpoint.name == "login":
            target = MIN_BUSY_CORES * (os.cpu_count() or 1)
            yield f"{_met(row.median('cores') >= target)} {name}: {row.median('cores'):.2f} cores, target {target:.1f}"
        if row.half is not None:
            tail = row.half.p99 / row.half.p50
            yield (
                f"{_met(tail <= MAX_TAIL_RATIO)} {name}: p99 is {tail:.1f} × p50 at half load, "
                f"target ≤ {MAX_TAIL_RATIO:g}"
            )


def _met(is_met: bool) -> str:
    return "met   " if is_met else "missed"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=int, default=3, help="seconds of one measurement")
    parser.add_argument("--repeats", type=int, default=3, help="number of rounds; the medians are printed")
    parser.add_argument("--only", default="", help="comma list of words in the names of endpoints")
    parser.add_argument("--no-half-load", dest="half_load", action="store_false", help="skip the latency at half load")
    parser.add_argument("--serve-baseline", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve_baseline:
        uvloop.run(serve_baseline(*options.serve_baseline))
        return
    if shutil.which("wrk") is None:
        raise SystemExit("wrk is missing: apt-get install wrk")
    bench(options)


def bench(options: argparse.Namespace) -> None:
    words = options.only.split(",")
    with (
        tempfile.TemporaryDirectory(prefix="bench-", ignore_cleanup_errors=True) as name,
        Stack(Path(name) / "data") as stack,
    ):
        folder = Path(name)
        migrations.apply(stack.postgres.url)
        with (
            server("off", stack, folder, RATE_LIMIT_DEFAULT="off") as off,
            server("limited", stack, folder, RATE_LIMIT_DEFAULT="1000000000/15minutes") as limited,
            baseline("bare", stack.postgres.url) as bare,
            baseline("select", stack.postgres.url) as select,
            baseline("unreset", stack.postgres.url) as unreset,
        ):
            endpoints = asyncio.run(create_fixtures(f"http://127.0.0.1:{off.port}"))
            asyncio.run(backdate_redis(stack.valkey.url))
            selected = [endpoint for endpoint in endpoints if any(word in endpoint.name for word in words)]
            selecting = Endpoint("baseline", f"/select/{asyncio.run(any_user_id(stack.postgres.url))}")
            rows = [
                Row(bare, Endpoint("baseline", "/bare")),
                Row(select, selecting),
                Row(unreset, selecting),
                *(Row(target, endpoint) for target in (off, limited) for endpoint in selected),
            ]
            measure(rows, options)
            print_results(rows)
        stack.mongo.kill()  # a graceful stop would take 2 s


if __name__ == "__main__":
    main()
