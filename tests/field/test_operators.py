"""Faults that operators and newcomers met: messages, probes, metrics, the dashboard, the first start."""

import asyncio
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from urllib.parse import urlsplit

import aiohttp
import pytest
import yaml

from server.devstack import dev
from server.devstack.stack import Stack
from server.jobs import dashboard
from server.jobs.types import JOB_TYPES
from server.settings import StackSettings
from tests.conftest import MakeActor, MakeServer, environment_of
from tests.deploy.test_nginx import Nginx, needs_nginx, nginx
from tests.ipv6 import needs_ipv6
from tests.jobs.requests import program_job, submit_job
from tests.observability.test_observability import rules
from tests.ops.test_metrics import scrape
from tests.processes import ROOT, Process, Processes
from tests.rest.test_try_it_out import Browser, browser
from tests.timeouts import WAIT_TIMEOUT_SECONDS

__all__ = ["browser", "nginx"]  # fixtures


@pytest.mark.parametrize("arguments", [("worker",), ("server",), ("worker", "--processes", "2")], ids=" ".join)
async def test_ctrl_c_on_an_idle_process_logs_no_warning(
    processes: Processes, isolated_stores: dict[str, str], arguments: tuple[str, ...]
) -> None:
    process = processes.command(*arguments, **environment_of(isolated_stores))
    process.wait_for_output(f"{arguments[0]} ready")
    await asyncio.sleep(1.2)  # the timers of a worker have run once, and sleep
    assert await asyncio.to_thread(process.terminate, number=signal.SIGINT) == 0
    assert [line for line in process.output.splitlines() if '"level":"info"' not in line] == []


# The sandbox ------------------------------------------------------------------------------------------------------


def test_a_worker_without_bubblewrap_logs_its_sandbox_and_how_to_improve_it_in_one_line(
    processes: Processes, isolated_stores: dict[str, str]
) -> None:
    missing_bwrap = 'server.jobs.tiers.BWRAP_PATH="/nowhere/bwrap"'
    worker = processes.worker(**environment_of(isolated_stores), override=missing_bwrap).ready()
    assert "FileNotFoundError" not in worker.output
    [line] = [line for line in worker.output.splitlines() if "sandbox" in line and "worker ready" not in line]
    entry = json.loads(line)
    assert (entry["level"], entry["event"]) == ("info", "sandbox selected")
    assert entry["tier"].startswith("landlock")
    assert entry["better"] == "bwrap: bubblewrap is not installed: apt-get install bubblewrap"


# Settings ---------------------------------------------------------------------------------------------------------


def one_line(process: Process) -> str:
    assert process.wait() == 1, process.output
    [line] = process.output.strip().splitlines()
    return line


@pytest.mark.parametrize("command", ["server", "worker", "dev", "migrate"])
def test_a_port_of_99999_is_reported_in_one_sentence(processes: Processes, command: str) -> None:
    assert one_line(processes.command(command, PORT="99999")) == (
        'error: Environment variable "PORT" invalid: '
        "Must be greater than or equal to 0 and less than or equal to 65535."
    )


# The first start --------------------------------------------------------------------------------------------------


def test_run_py_outside_the_venv_prints_how_to_start_it() -> None:
    # With -S it finds the standard library only, as the machine's own Python does.
    command = [os.path.realpath(sys.executable), "-S", str(ROOT / "run.py"), "server"]
    bare = subprocess.run(command, env={}, capture_output=True, text=True)
    assert bare.returncode == 1
    assert "Traceback" not in bare.stderr
    [line] = bare.stderr.splitlines()
    assert line.startswith("error: ")
    assert "Run scripts/dev once" in line
    assert ".venv/bin/python run.py" in line


def test_an_import_error_of_the_server_is_still_a_traceback(tmp_path: Path) -> None:
    shutil.copy(ROOT / "run.py", tmp_path)
    (tmp_path / "server").mkdir()
    (tmp_path / "server" / "cli.py").write_text("import server.nothing\n")
    broken = subprocess.run([sys.executable, str(tmp_path / "run.py")], capture_output=True, text=True)
    assert "No module named 'server.nothing'" in broken.stderr
    assert "scripts/dev" not in broken.stderr


RECORDER = """#!/bin/sh
printf '%s\\n' "$PORT" "$DATABASE_URL" "$@"
"""


def test_the_printed_join_command_works_in_a_folder_with_a_space(
    stack: Stack, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "Ada's own code"
    folder.mkdir()
    python, env_file = folder / "python", folder / "stack.env"
    python.write_text(RECORDER)
    python.chmod(0o755)
    settings = StackSettings(data_dir=folder, host="127.0.0.1", port=65535)
    shutil.copy(stack.write_env(host=settings.host, port=settings.port), env_file)
    monkeypatch.setattr(sys, "executable", str(python))
    monkeypatch.setattr(dev, "RUN_SCRIPT", folder / "run.py")
    [command] = re.findall(r"joins with\n +(.*)\n", dev.summary(settings, stack, env_file))
    joined = subprocess.run(["sh", "-c", command], capture_output=True, text=True, check=True)
    assert joined.stdout.splitlines() == ["65534", stack.postgres.url, str(folder / "run.py"), "server"]


# IPv6 -------------------------------------------------------------------------------------------------------------


@needs_ipv6
async def test_a_server_that_listens_on_ipv6_prints_a_valid_address(
    processes: Processes, http: aiohttp.ClientSession
) -> None:
    server = processes.server(HOST="::1")
    assert re.fullmatch(r"http://\[::1\]:\d+", server.base)
    async with http.get(f"{server.base}/health") as answer:
        assert answer.status == 200


@needs_ipv6
@pytest.mark.parametrize("arguments", [(), ("--processes", "2")])
def test_an_occupied_port_on_ipv6_is_reported_with_brackets(processes: Processes, arguments: tuple[str, ...]) -> None:
    with socket.create_server(("::1", 0), family=socket.AF_INET6) as occupant:
        port = occupant.getsockname()[1]
        line = one_line(processes.server(*arguments, HOST="::1", PORT=str(port)))
    assert line == f"error: Cannot listen on [::1]:{port}: Address already in use"


# Metrics ----------------------------------------------------------------------------------------------------------


async def test_the_metric_of_an_empty_queue_is_0_and_not_absent(
    http: aiohttp.ClientSession, make_server: MakeServer, isolated_stores: dict[str, str]
) -> None:
    samples = await scrape(http, await make_server(**isolated_stores))
    for name in ("jobs_unfinished", "jobs_oldest_seconds"):
        values = {series: value for series, value in samples.items() if series.startswith(name + "{")}
        assert len(values) == len(JOB_TYPES) * 4
        assert set(values.values()) == {0}


async def test_the_autoscaler_counts_3_jobs_as_3_for_any_number_of_processes(
    http: aiohttp.ClientSession, make_server: MakeServer, make_actor: MakeActor, isolated_stores: dict[str, str]
) -> None:
    """Five more jobs wait for other jobs of the same user; more workers would not start them."""
    bases = [await make_server(**isolated_stores, jobs_per_user=3) for _ in range(3)]
    ada = await make_actor("Ada", bases[0])
    for _ in range(8):
        await submit_job(ada, program_job("print(1)"))
    samples = [sample for base in bases for sample in (await scrape(http, base)).items()]
    assert autoscaled(samples) == 3
    limited = [value for series, value in samples if series == 'jobs_unfinished{state="limited",type="CODE_EXECUTION"}']
    assert limited == [5, 5, 5]


def autoscaled(samples: list[tuple[str, float]]) -> float:
    """Evaluate the recording rule, as Prometheus does, on the samples of all processes."""
    [expression] = [rule["expr"] for rule in rules("record") if rule["record"] == "jobs_for_workers"]
    query = re.fullmatch(r'sum\(max by \((.*)\) \((\w+)\{job="[\w-]+", state=~"(.*)"\}\)\)', expression)
    assert query
    maxima: dict[tuple[str, ...], float] = {}
    for series, value in samples:
        labels = dict(re.findall(r'(\w+)="([^"]*)"', series))
        if series.startswith(query[2] + "{") and re.fullmatch(query[3], labels["state"]):
            group = tuple(labels[name] for name in query[1].split(", "))
            maxima[group] = max(value, maxima.get(group, value))
    return sum(maxima.values())


async def test_a_counter_is_exported_before_its_first_event(http: aiohttp.ClientSession, processes: Processes) -> None:
    samples = await scrape(http, processes.server().base)
    for series in (
        'websocket_frames_dropped_total{delivery="ephemeral"}',
        'document_updates_total{outcome="refused"}',
        'postgres_replica_reads_total{store="primary"}',
        'project_cache_total{cache="redis",outcome="miss"}',
    ):
        assert samples[series] == 0


# Probes -----------------------------------------------------------------------------------------------------------


def probe_of_the_worker(port: int) -> list[str]:
    """Return the probe of docker-compose.yml, with this Python and this port."""
    probe = yaml.safe_load((ROOT / "docker-compose.yml").read_text())["services"]["worker"]["healthcheck"]["test"]
    assert probe[:2] == ["CMD", "python"]
    return [sys.executable, *(word.replace(":9464/", f":{port}/") for word in probe[2:])]


def exit_code(command: list[str]) -> int:
    return subprocess.run(command, stderr=subprocess.DEVNULL).returncode


async def test_a_worker_whose_redis_has_another_port_is_alive_and_one_that_hangs_is_not(
    processes: Processes, isolated_stores: dict[str, str], http: aiohttp.ClientSession, unused_tcp_port: int
) -> None:
    assert ":6379" not in isolated_stores["redis_url"]
    probe = probe_of_the_worker(unused_tcp_port)
    assert exit_code(probe) == 1
    worker = processes.worker(METRICS_PORT=str(unused_tcp_port), **environment_of(isolated_stores)).ready()
    assert await asyncio.to_thread(exit_code, probe) == 0
    async with http.get(f"http://127.0.0.1:{unused_tcp_port}/health") as answer:
        assert (await answer.json())["status"] == "ok"
    worker.freeze()
    assert await asyncio.to_thread(exit_code, probe) == 1
    worker.unfreeze()


async def test_the_health_of_a_worker_is_public_where_its_metrics_are_disabled(
    processes: Processes, isolated_stores: dict[str, str], http: aiohttp.ClientSession, unused_tcp_port: int
) -> None:
    production = {"APP_ENV": "production", "BCRYPT_ROUNDS": "10", "METRICS_PORT": str(unused_tcp_port)}
    processes.worker(**production, **environment_of(isolated_stores)).ready()
    for path, status in (("/health", 200), ("/metrics", 404)):
        async with http.get(f"http://127.0.0.1:{unused_tcp_port}{path}") as answer:
            assert answer.status == status


# nginx ------------------------------------------------------------------------------------------------------------


@needs_nginx
@pytest.mark.parametrize(
    ("target", "path", "status"),
    [
        ("/api/v1/projects/5f2b?cursor=hidden", "/api/v1/projects/5f2b", 503),
        ("/ws?ticket=hidden", "/ws", 503),
        ("/a%20b/..%2Fc?x=hidden", "/a%20b/..%2Fc", 503),
        ("/.problem?x=hidden", "/.problem", 404),
        ("/" + 9000 * "x" + "?x=hidden", "", 414),
    ],
    ids=["path", "socket", "encoded", "internal path", "too long"],
)
async def test_the_log_of_nginx_contains_the_requested_path_without_its_query(
    nginx: Nginx, target: str, path: str, status: int, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    address = urlsplit(await nginx(None, None))
    reader, writer = await asyncio.open_connection(address.hostname, address.port)
    writer.write(f"GET {target} HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n".encode())
    assert (await reader.read()).startswith(f"HTTP/1.1 {status} ".encode())
    writer.close()
    log = (await wait_for_match(tmp_path / "log", r".*\n")).string
    [line] = map(json.loads, log.splitlines())
    assert (line["path"], line["status"]) == (path, status)
    assert "hidden" not in log + "".join(capfd.readouterr())


async def wait_for_match(file: Path, pattern: str) -> re.Match[str]:
    """Wait for a match in a file that a process writes, and return it."""
    async with asyncio.timeout(WAIT_TIMEOUT_SECONDS):
        while not (file.exists() and (match := re.search(pattern, file.read_text()))):
            await asyncio.sleep(0.02)
    return match


@needs_nginx
async def test_a_page_of_another_origin_can_read_that_no_server_is_reachable(
    nginx: Nginx, http: aiohttp.ClientSession
) -> None:
    base = await nginx(None, None)
    async with http.get(f"{base}/api/v1/projects", headers={"Origin": "https://app.example.org"}) as answer:
        assert (answer.status, (await answer.json())["code"]) == (503, "unavailable")
        assert answer.headers["Access-Control-Allow-Origin"] == "*"
        assert "Retry-After" in answer.headers["Access-Control-Expose-Headers"]


# The dashboard ----------------------------------------------------------------------------------------------------


def view_queues(browser: Browser, base: str, job: str) -> None:
    for _ in range(2):  # the second time from the browser's cache
        browser.open(f"{base}/ops/queues")
        browser.until("main h1", "Queues")
        browser.until("tbody tr td:first-child", "high", "normal", "low")
    browser.click("tbody tr:nth-child(2) a")
    browser.until("main hgroup > *", "Queue", "normal")
    assert browser.address == f"{base}/ops/queues/queues/normal"
    browser.click("[href*='/jobs/'] td")
    browser.until("main hgroup > *", "Job", f"{job}:1")
    browser.until("hgroup + p", dashboard.READ_ONLY_MESSAGE)
    assert browser.count("[role=button]") == 0
    browser.click("td a")
    browser.until("main hgroup > *", "Queue", "normal")
    assert browser.complaints() == []


def view_queues_on_a_phone(browser: Browser, base: str, job: str) -> None:
    browser.resize(390, 844)
    for path in ("/", "/queues/normal", f"/queues/normal/jobs/{job}:1"):
        browser.open(f"{base}/ops/queues{path}")
        browser.find("main table")
        assert browser.width_of_page() == 390


@pytest.mark.parametrize("view", [view_queues, view_queues_on_a_phone])
async def test_the_dashboard_is_readable_and_has_no_buttons_without_effect(
    view: Callable[[Browser, str, str], None],
    browser: Browser,
    make_server: MakeServer,
    make_actor: MakeActor,
    isolated_stores: dict[str, str],
) -> None:
    base = await make_server(**isolated_stores)
    job = (await submit_job(await make_actor("Ada", base)))["id"]
    await asyncio.to_thread(view, browser, base, job)
