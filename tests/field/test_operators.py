"""What operators and newcomers met: messages, probes, metrics, the dashboard, the first start."""

import asyncio
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path

import aiohttp
import pytest

from server.devstack import dev
from server.devstack.stack import Stack
from server.settings import StackSettings
from tests.conftest import environment
from tests.processes import ROOT, Process, Processes


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
async def test_ctrl_c_on_an_idle_worker_warns_of_nothing(
    processes: Processes, quiet: dict[str, str], number: signal.Signals
) -> None:
    worker = processes.worker(**environment(quiet)).ready()
    await asyncio.sleep(1.2)  # its timers have had a turn, and sleep
    assert await asyncio.to_thread(worker.terminate, number=number) == 0
    assert [line for line in worker.output.splitlines() if '"level":"info"' not in line] == []


# Settings ---------------------------------------------------------------------------------------------------------


def one_line(process: Process) -> str:
    assert process.wait() == 1, process.output
    [line] = process.output.strip().splitlines()
    return line


@pytest.mark.parametrize("command", ["server", "worker", "dev", "migrate"])
def test_a_port_of_99999_is_not_answered_with_a_python_list(processes: Processes, command: str) -> None:
    assert one_line(processes.command(command, PORT="99999")) == (
        'error: Environment variable "PORT" invalid: '
        "Must be greater than or equal to 0 and less than or equal to 65535."
    )


# The first start --------------------------------------------------------------------------------------------------


def test_run_py_outside_the_venv_says_what_to_do() -> None:
    # With -S it sees no package but the standard library, as the machine's own Python.
    command = [os.path.realpath(sys.executable), "-S", str(ROOT / "run.py"), "server"]
    bare = subprocess.run(command, env={}, capture_output=True, text=True)
    assert bare.returncode == 1
    assert "Traceback" not in bare.stderr
    [line] = bare.stderr.splitlines()
    assert line.startswith("error: ")
    assert "Run scripts/dev once" in line
    assert ".venv/bin/python run.py" in line


def test_a_fault_of_our_own_is_still_a_traceback(tmp_path: Path) -> None:
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
    wanted = StackSettings(data_dir=folder, host="127.0.0.1", port=65535)
    shutil.copy(stack.write_env(host=wanted.host, port=wanted.port), env_file)
    monkeypatch.setattr(sys, "executable", str(python))
    monkeypatch.setattr(dev, "RUN", folder / "run.py")
    [command] = re.findall(r"joins with\n +(.*)\n", dev.summary(wanted, stack, env_file))
    joined = subprocess.run(["sh", "-c", command], capture_output=True, text=True, check=True)
    assert joined.stdout.splitlines() == ["65534", stack.postgres.url, str(folder / "run.py"), "server"]


# IPv6 -------------------------------------------------------------------------------------------------------------


def has_ipv6() -> bool:
    try:
        with socket.create_server(("::1", 0), family=socket.AF_INET6):
            return True
    except OSError:
        return False


needs_ipv6 = pytest.mark.skipif(not has_ipv6(), reason="this machine has no IPv6")


@needs_ipv6
async def test_a_server_that_listens_on_ipv6_prints_an_address_that_can_be_called(
    processes: Processes, http: aiohttp.ClientSession
) -> None:
    server = processes.server(HOST="::1")
    assert re.fullmatch(r"http://\[::1\]:\d+", server.base)
    async with http.get(f"{server.base}/health") as answer:
        assert answer.status == 200


@needs_ipv6
@pytest.mark.parametrize("arguments", [(), ("--processes", "2")])
def test_a_port_that_is_taken_on_ipv6_is_named_with_brackets(processes: Processes, arguments: tuple[str, ...]) -> None:
    with socket.create_server(("::1", 0), family=socket.AF_INET6) as taken:
        port = taken.getsockname()[1]
        line = one_line(processes.server(*arguments, HOST="::1", PORT=str(port)))
    assert line == f"error: Cannot listen on [::1]:{port}: Address already in use"
