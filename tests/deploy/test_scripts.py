"""Test scripts/dev, scripts/test and their shared code, on a machine whose Python only logs its arguments."""

import contextlib
import os
import pty
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.processes import ROOT
from tests.timeouts import WAIT_TIMEOUT_SECONDS

TOOLS = ("sh", "cat", "cksum", "cp", "date", "dirname", "flock", "mkdir", "mv", "rm", "sed", "sleep", "tail")
PYTHON = """#!/bin/sh
# Logs its arguments, except for the questions about this Python itself.
case "$1 $2" in
"-c import ensurepip"*) exit ${NO_ENSUREPIP:-0} ;;
"-c "*) exit 0 ;;
"-m venv")
    for folder; do :; done
    mkdir -p "$folder/bin"
    cp "$0" "$folder/bin/python" ;;
esac
echo "$*" >>"$NOTES"
if [ -n "${PIP_WAITS_FOR:-}" ] && [ "$2 $3" = "pip install" ]; then
    echo "Collecting duckdb>=2.0 (from collaborative-workspace-backend)"
    while [ ! -e "$PIP_WAITS_FOR" ]; do sleep 0.05; done
fi
exit ${PIP_FAILS:-0}
"""


@dataclass
class Machine:
    root: Path

    def run(
        self, script: str, *arguments: str, cwd: Path | None = None, **variables: str
    ) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [str(self.root / "scripts" / script), *arguments],
            env={"PATH": str(self.root / "bin"), "NOTES": str(self.notes), **variables},
            cwd=cwd or self.root,
            capture_output=True,
            text=True,
        )

    @contextlib.contextmanager
    def installing(self, **streams: int) -> Iterator[tuple[subprocess.Popen[bytes], Path]]:
        """Run scripts/dev with a pip that waits until the yielded file exists."""
        release = self.root / "release"
        environment = {"PATH": str(self.root / "bin"), "NOTES": str(self.notes), "PIP_WAITS_FOR": str(release)}
        with subprocess.Popen(
            [str(self.root / "scripts/dev")],
            env={**environment, "PROGRESS_SECONDS": "1"},
            start_new_session=True,
            # A shell starts what it runs in the background with SIGINT ignored, and so would we.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
            **streams,
        ) as process:
            try:
                yield process, release
            finally:
                release.touch()

    @property
    def notes(self) -> Path:
        return self.root / "notes"

    def read_commands(self) -> list[str]:
        """Return the commands that Python received since the last call."""
        lines = self.notes.read_text().splitlines() if self.notes.exists() else []
        self.notes.unlink(missing_ok=True)
        return [line.replace(str(self.root), "ROOT") for line in lines]


INSTALL = (
    "-m pip install --quiet --disable-pip-version-check --constraint ROOT/constraints.txt --editable ROOT[{extra}]"
)
DISTRIBUTED = "-m pytest -n {processes} --dist worksteal"


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    for folder in ("scripts", "bin", "tests"):
        (tmp_path / folder).mkdir()
    for script in ("dev", "demo", "test", "check", "lint", "venv.sh"):
        shutil.copy(ROOT / "scripts" / script, tmp_path / "scripts")
    for name in ("setup.cfg", "pyproject.toml", "constraints.txt", "run.py"):
        shutil.copy(ROOT / name, tmp_path)
    (tmp_path / "tests" / "test_one.py").touch()
    for tool in TOOLS:
        path = shutil.which(tool)
        assert path
        (tmp_path / "bin" / tool).symlink_to(path)
    python = tmp_path / "bin" / "python3.11"
    python.write_text(PYTHON)
    python.chmod(0o755)
    return Machine(tmp_path)


def test_the_first_call_installs_and_the_second_does_not(machine: Machine) -> None:
    assert machine.run("dev").returncode == 0
    assert machine.read_commands() == ["-m venv ROOT/.venv", INSTALL.format(extra="embedded"), "run.py dev"]
    assert machine.run("dev").returncode == 0
    assert machine.read_commands() == ["run.py dev"]


def test_the_extra_test_serves_dev_too_and_changed_dependencies_are_installed_again(machine: Machine) -> None:
    machine.run("test")
    assert machine.read_commands()[:2] == ["-m venv ROOT/.venv", INSTALL.format(extra="test")]
    machine.run("dev")
    assert machine.read_commands() == ["run.py dev"]
    for name in ("setup.cfg", "constraints.txt"):
        with (machine.root / name).open("a") as file:
            file.write("# another dependency\n")
        machine.run("test")
        assert machine.read_commands()[0] == INSTALL.format(extra="test")


@pytest.mark.parametrize(("processors", "processes"), [(1, 2), (2, 3), (64, 8)])
def test_a_whole_run_is_distributed_over_processes(machine: Machine, processors: int, processes: int) -> None:
    nproc = machine.root / "bin" / "nproc"
    nproc.write_text(f"#!/bin/sh\necho {processors}\n")
    nproc.chmod(0o755)
    for arguments in ((), ("-x",), ("--full",)):
        machine.run("test", *arguments)
        assert machine.read_commands()[-1] == " ".join((DISTRIBUTED.format(processes=processes), *arguments))


@pytest.mark.parametrize("choice", ["-n0", "-k name", "--lf", "ROOT/tests/test_one.py"])
def test_a_selection_of_tests_runs_in_one_process(machine: Machine, choice: str) -> None:
    machine.run("test", *choice.replace("ROOT/", "").split())
    assert machine.read_commands()[-1] == f"-m pytest {choice}"


def test_a_path_is_relative_to_the_directory_of_the_caller(machine: Machine) -> None:
    machine.run("test", "test_one.py", "-k", "some/name", cwd=machine.root / "tests")
    assert machine.read_commands()[-1] == "-m pytest ROOT/tests/test_one.py -k some/name"
    machine.run("test", "--cov", "--full", "tests/test_one.py::test_x")
    assert (
        machine.read_commands()[-1] == "-m pytest --cov=server --cov-report=term --full ROOT/tests/test_one.py::test_x"
    )


def test_a_foreign_venv_is_moved_aside_and_a_moved_venv_is_recreated(machine: Machine) -> None:
    venv = machine.root / ".venv"
    venv.mkdir()
    (venv / "precious").touch()
    result = machine.run("dev")
    (aside,) = machine.root.glob(".venv.*")
    assert (aside / "precious").exists()
    assert f"moved the existing .venv to {aside}" in result.stderr
    machine.read_commands()

    (venv / "made-at").write_text("/elsewhere/.venv\n")
    machine.run("dev")
    assert machine.read_commands()[0] == "-m venv ROOT/.venv"
    assert len(list(machine.root.glob(".venv.*"))) == 1


def test_a_failed_installation_is_reported_and_retried_by_the_next_call(machine: Machine) -> None:
    failed = machine.run("dev", PIP_FAILS="1")
    assert failed.returncode == 1
    assert failed.stderr.splitlines()[-1].startswith("dev: error: ")
    machine.read_commands()
    assert machine.run("dev").returncode == 0
    assert machine.read_commands()[-2:] == [INSTALL.format(extra="embedded"), "run.py dev"]


def test_a_venv_is_created_without_pip_if_ensurepip_is_missing(machine: Machine) -> None:
    assert machine.run("dev", NO_ENSUREPIP="1").returncode == 0
    assert machine.read_commands()[0] == "-m venv --without-pip ROOT/.venv"


def test_a_missing_python_is_reported_with_the_versions_to_install(machine: Machine) -> None:
    (machine.root / "bin" / "python3.11").unlink()
    result = machine.run("dev")
    assert result.returncode == 1
    assert "no Python 3.11, 3.12 or 3.13 found" in result.stderr


@pytest.mark.parametrize("script", ["dev", "demo", "test", "check", "lint"])
def test_help_is_the_comment_at_the_head_of_the_script(script: str, machine: Machine) -> None:
    result = machine.run(script, "--help")
    assert result.returncode == 0
    assert result.stdout.startswith(f"Usage: scripts/{script}")
    assert not machine.read_commands()


def read_until(pattern: bytes, descriptor: int) -> bytes:
    """Return the output of a process up to a match."""
    output = b""
    while not re.search(pattern, output):
        chunk = os.read(descriptor, 4096)
        assert chunk, output
        output += chunk
    return output


def test_a_long_installation_shows_its_current_step(machine: Machine) -> None:
    with machine.installing(stderr=subprocess.PIPE) as (process, release):
        assert process.stderr
        read_until(rb"\ndev: 2 s looking for duckdb\n", process.stderr.fileno())
        release.touch()
        assert process.wait(timeout=WAIT_TIMEOUT_SECONDS) == 0
        rest = process.stderr.read()
    assert re.fullmatch(rb"(dev: \d+ s looking for duckdb\n)*", rest)


def test_the_progress_on_a_terminal_is_one_line_that_disappears(machine: Machine) -> None:
    controller, terminal = pty.openpty()
    with machine.installing(stderr=terminal) as (process, release):
        shown = read_until(rb"dev: 2 s looking for duckdb", controller)
        release.touch()
        shown += read_until(rb"\r\x1b\[K$", controller)
        assert process.wait(timeout=WAIT_TIMEOUT_SECONDS) == 0
    os.close(terminal)
    os.close(controller)
    assert b"\r\x1b[Kdev: 1 s looking for duckdb\r\x1b[Kdev: 2 s" in shown


def test_ctrl_c_stops_an_installation_and_its_progress(machine: Machine) -> None:
    with machine.installing(stderr=subprocess.PIPE) as (process, _):
        assert process.stderr
        read_until(rb"looking for duckdb\n", process.stderr.fileno())
        os.killpg(process.pid, signal.SIGINT)
        assert process.wait(timeout=WAIT_TIMEOUT_SECONDS) != 0
        deadline = time.monotonic() + WAIT_TIMEOUT_SECONDS
        with contextlib.suppress(ProcessLookupError):
            while time.monotonic() < deadline:
                os.killpg(process.pid, 0)
                time.sleep(0.05)
            pytest.fail("a process of the installation is still running")
