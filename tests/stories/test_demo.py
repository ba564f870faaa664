"""``scripts/demo``, as a new user runs it."""

import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from server.devstack.stack import free_port
from tests.devstack.pids import all_exited, children_of
from tests.processes import ROOT
from tests.timeouts import PROCESS_TIMEOUT_SECONDS


class Demo:
    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.environment = {
            **os.environ,
            "DATA_DIR": str(folder / "data"),
            "HOST": "127.0.0.1",
            "PORT": str(free_port()),
            "TMPDIR": str(folder),
            "JOB_FAULT_RATE": "0",
        }
        self.log = folder / "demo.txt"

    def start(self, script: str = "scripts/demo.py", *arguments: str) -> "subprocess.Popen[bytes]":
        with self.log.open("ab") as output:
            return subprocess.Popen(
                [sys.executable, script, *arguments],
                cwd=ROOT,
                env=self.environment,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    @property
    def output(self) -> str:
        return self.log.read_text()

    def until(self, words: str, *, seconds: float = PROCESS_TIMEOUT_SECONDS) -> None:
        deadline = time.monotonic() + seconds
        while words not in self.output:
            assert time.monotonic() < deadline, self.output
            time.sleep(0.05)


@pytest.fixture
def demo() -> Iterator[Demo]:
    with tempfile.TemporaryDirectory(prefix="demo-", ignore_cleanup_errors=True) as folder:
        Path(folder).chmod(0o711)
        yield Demo(Path(folder))


def test_demo_waits_for_a_starting_server_and_runs_against_it(demo: Demo) -> None:
    dev = demo.start("run.py", "dev")
    running = demo.start()
    assert running.wait(timeout=90) == 0, demo.output
    assert "scripts/dev is starting: waiting for it" in demo.output
    printed = re.sub(r"\d+(\.\d+)? m?s\b", "TIME", demo.output)
    for line in (
        "Ada  creates the project",
        "Bob  joins the workspace; online now: Ada and Bob",
        "Ada  hears USER_JOIN: Bob",
        "Ada  types 'import sys'; Bob sees it after TIME",
        "job  processing, attempt 1",
        "job  │ 4 16",
        "job  │ the sandbox says: No such file or directory",
        "job  exit code 0 after TIME",
        "Ada  hears USER_LEAVE: Bob",
        "done in TIME",
    ):
        assert line in printed, demo.output
    dev.send_signal(signal.SIGINT)
    assert dev.wait(timeout=PROCESS_TIMEOUT_SECONDS) == 0, demo.output


def test_terminated_demo_leaves_no_process_behind(demo: Demo) -> None:
    running = demo.start()
    demo.until("starting one for the demo")
    while not (children := children_of(running.pid)):
        time.sleep(0.05)
    while len(grandchildren := list(children_of(children["dev"]).values())) < 3:
        time.sleep(0.05)
    running.terminate()
    assert running.wait(timeout=PROCESS_TIMEOUT_SECONDS) == 143, demo.output
    assert all_exited([*children.values(), *grandchildren])


def test_demo_reports_a_missing_server_in_one_line(demo: Demo) -> None:
    assert demo.start("scripts/demo.py", "--url", "http://127.0.0.1:9").wait(timeout=PROCESS_TIMEOUT_SECONDS) == 1
    assert demo.output == "demo: no server is ready at http://127.0.0.1:9\n"
