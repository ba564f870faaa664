"""scripts/dev, scripts/test and what they share, on a machine whose Python only notes what it is asked."""

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

from tests.patience import PATIENCE_SECONDS
from tests.processes import ROOT

TOOLS = ("sh", "cat", "cksum", "cp", "date", "dirname", "flock", "mkdir", "mv", "rm", "sed", "sleep", "tail")
PYTHON = """#!/bin/sh
# Of the many questions that a Python is asked, those about itself are not noted.
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
        self, script: str, *arguments: str, cwd: Path | None = None, **beside: str
    ) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [str(self.root / "scripts" / script), *arguments],
            env={"PATH": str(self.root / "bin"), "NOTES": str(self.notes), **beside},
            cwd=cwd or self.root,
            capture_output=True,
            text=True,
        )

    @contextlib.contextmanager
    def installing(self, **streams: int) -> Iterator[tuple[subprocess.Popen[bytes], Path]]:
        """scripts/dev while pip takes its time: it ends when the file is there."""
        release = self.root / "release"
        environment = {"PATH": str(self.root / "bin"), "NOTES": str(self.notes), "PIP_WAITS_FOR": str(release)}
        with subprocess.Popen(
            [str(self.root / "scripts/dev")],
            env={**environment, "PROGRESS_SECONDS": "1"},
            start_new_session=True,
            # A shell starts what it runs in the background with SIGINT ignored, and so would we.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
            **streams,
        ) as running:
            try:
                yield running, release
            finally:
                release.touch()

    @property
    def notes(self) -> Path:
        return self.root / "notes"

    def asked(self) -> list[str]:
        """What Python was asked since the last look."""
        lines = self.notes.read_text().splitlines() if self.notes.exists() else []
        self.notes.unlink(missing_ok=True)
        return [line.replace(str(self.root), "ROOT") for line in lines]


INSTALL = (
    "-m pip install --quiet --disable-pip-version-check --constraint ROOT/constraints.txt --editable ROOT[{extra}]"
)
SHARED_OUT = "-m pytest -n {processes} --dist worksteal"


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    for folder in ("scripts", "bin", "tests"):
        (tmp_path / folder).mkdir()
    for script in ("dev", "demo", "test", "check", "venv.sh"):
        shutil.copy(ROOT / "scripts" / script, tmp_path / "scripts")
    for name in ("setup.cfg", "pyproject.toml", "constraints.txt", "run.py"):
        shutil.copy(ROOT / name, tmp_path)
    (tmp_path / "tests" / "test_one.py").touch()
    for tool in TOOLS:
        found = shutil.which(tool)
        assert found
        (tmp_path / "bin" / tool).symlink_to(found)
    python = tmp_path / "bin" / "python3.11"
    python.write_text(PYTHON)
    python.chmod(0o755)
    return Machine(tmp_path)


def test_the_first_call_installs_and_the_second_does_not(machine: Machine) -> None:
    assert machine.run("dev").returncode == 0
    assert machine.asked() == ["-m venv ROOT/.venv", INSTALL.format(extra="embedded"), "run.py dev"]
    assert machine.run("dev").returncode == 0
    assert machine.asked() == ["run.py dev"]


def test_the_tests_extra_serves_dev_too_and_a_change_of_dependencies_installs_anew(machine: Machine) -> None:
    machine.run("test")
    assert machine.asked()[:2] == ["-m venv ROOT/.venv", INSTALL.format(extra="test")]
    machine.run("dev")
    assert machine.asked() == ["run.py dev"]
    for name in ("setup.cfg", "constraints.txt"):
        with (machine.root / name).open("a") as file:
            file.write("# another dependency\n")
        machine.run("test")
        assert machine.asked()[0] == INSTALL.format(extra="test")


@pytest.mark.parametrize(("processors", "processes"), [(1, 2), (2, 3), (64, 8)])
def test_a_whole_run_is_shared_out_among_processes(machine: Machine, processors: int, processes: int) -> None:
    nproc = machine.root / "bin" / "nproc"
    nproc.write_text(f"#!/bin/sh\necho {processors}\n")
    nproc.chmod(0o755)
    for arguments in ((), ("-x",), ("--full",)):
        machine.run("test", *arguments)
        assert machine.asked()[-1] == " ".join((SHARED_OUT.format(processes=processes), *arguments))


@pytest.mark.parametrize("choice", ["-n0", "-k name", "--lf", "ROOT/tests/test_one.py"])
def test_a_choice_of_tests_runs_in_one_process(machine: Machine, choice: str) -> None:
    machine.run("test", *choice.replace("ROOT/", "").split())
    assert machine.asked()[-1] == f"-m pytest {choice}"


def test_a_file_is_meant_as_seen_from_where_one_stands(machine: Machine) -> None:
    machine.run("test", "test_one.py", "-k", "some/name", cwd=machine.root / "tests")
    assert machine.asked()[-1] == "-m pytest ROOT/tests/test_one.py -k some/name"
    machine.run("test", "--cov", "--full", "tests/test_one.py::test_x")
    assert machine.asked()[-1] == "-m pytest --cov=server --cov-report=term --full ROOT/tests/test_one.py::test_x"


def test_a_venv_that_somebody_made_is_put_aside_and_one_that_was_moved_is_made_anew(machine: Machine) -> None:
    mine = machine.root / ".venv"
    mine.mkdir()
    (mine / "precious").touch()
    told = machine.run("dev")
    (aside,) = machine.root.glob(".venv.*")
    assert (aside / "precious").exists()
    assert f"the .venv that was here is now {aside}" in told.stderr
    machine.asked()

    (mine / "made-at").write_text("/elsewhere/.venv\n")
    machine.run("dev")
    assert machine.asked()[0] == "-m venv ROOT/.venv"
    assert len(list(machine.root.glob(".venv.*"))) == 1


def test_an_installation_that_fails_says_so_and_is_tried_again(machine: Machine) -> None:
    failed = machine.run("dev", PIP_FAILS="1")
    assert failed.returncode == 1
    assert failed.stderr.splitlines()[-1].startswith("dev: error: ")
    machine.asked()
    assert machine.run("dev").returncode == 0
    assert machine.asked()[-2:] == [INSTALL.format(extra="embedded"), "run.py dev"]


def test_without_ensurepip_a_venv_is_made_without_pip(machine: Machine) -> None:
    assert machine.run("dev", NO_ENSUREPIP="1").returncode == 0
    assert machine.asked()[0] == "-m venv --without-pip ROOT/.venv"


def test_without_a_python_it_says_what_to_install(machine: Machine) -> None:
    (machine.root / "bin" / "python3.11").unlink()
    told = machine.run("dev")
    assert told.returncode == 1
    assert "no Python 3.11, 3.12 or 3.13 found" in told.stderr


@pytest.mark.parametrize("script", ["dev", "demo", "test", "check"])
def test_help_is_the_comment_at_the_head(script: str, machine: Machine) -> None:
    told = machine.run(script, "--help")
    assert told.returncode == 0
    assert told.stdout.startswith(f"Usage: scripts/{script}")
    assert not machine.asked()


def read_until(pattern: bytes, descriptor: int) -> bytes:
    """Return what a process writes, up to a match."""
    read = b""
    while not re.search(pattern, read):
        more = os.read(descriptor, 4096)
        assert more, read
        read += more
    return read


def test_a_long_installation_shows_where_it_is(machine: Machine) -> None:
    with machine.installing(stderr=subprocess.PIPE) as (running, release):
        assert running.stderr
        read_until(rb"\ndev: 2 s looking for duckdb\n", running.stderr.fileno())
        release.touch()
        assert running.wait(timeout=PATIENCE_SECONDS) == 0
        rest = running.stderr.read()
    assert re.fullmatch(rb"(dev: \d+ s looking for duckdb\n)*", rest)


def test_on_a_terminal_the_progress_is_one_line_that_goes_away(machine: Machine) -> None:
    ours, theirs = pty.openpty()
    with machine.installing(stderr=theirs) as (running, release):
        shown = read_until(rb"dev: 2 s looking for duckdb", ours)
        release.touch()
        shown += read_until(rb"\r\x1b\[K$", ours)
        assert running.wait(timeout=PATIENCE_SECONDS) == 0
    os.close(theirs)
    os.close(ours)
    assert b"\r\x1b[Kdev: 1 s looking for duckdb\r\x1b[Kdev: 2 s" in shown


def test_ctrl_c_ends_an_installation_and_what_shows_it(machine: Machine) -> None:
    with machine.installing(stderr=subprocess.PIPE) as (running, _):
        assert running.stderr
        read_until(rb"looking for duckdb\n", running.stderr.fileno())
        os.killpg(running.pid, signal.SIGINT)
        assert running.wait(timeout=PATIENCE_SECONDS) != 0
        deadline = time.monotonic() + PATIENCE_SECONDS
        with contextlib.suppress(ProcessLookupError):
            while time.monotonic() < deadline:
                os.killpg(running.pid, 0)
                time.sleep(0.05)
            pytest.fail("something goes on")
