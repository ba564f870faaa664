"""What .ci/run does on a machine of any kind; the machine is played by a PATH of our own."""

import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.processes import ROOT

TOOLS = ("bash", "sh", "cat", "chmod", "dirname", "env", "head", "nproc", "uname")
WANTED = ("python3", "bwrap", "node", "npm", "chromium", "chromedriver", "wrk")  # nginx is where PATH is added to


@dataclass(frozen=True)
class Machine:
    folder: Path

    def has(self, *commands: str, script: str = "echo 1.0") -> None:
        for command in commands:
            path = self.folder / "bin" / command
            path.write_text(f"#!/bin/sh\n{script}\n")
            path.chmod(0o755)

    def ci(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        command = ["bash", str(self.folder / ".ci/run"), *arguments]
        return subprocess.run(
            command,
            env={"PATH": str(self.folder / "bin")},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
        )

    @property
    def as_root(self) -> list[str]:
        """What was done by sudo."""
        log = self.folder / "sudo.log"
        return log.read_text().splitlines() if log.exists() else []


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    """One whose sudo notes what it is asked and does nothing."""
    for folder in (".ci", "bin", "scripts"):
        (tmp_path / folder).mkdir()
    shutil.copy(ROOT / ".ci/run", tmp_path / ".ci")
    for tool in TOOLS:
        found = shutil.which(tool)
        assert found
        (tmp_path / "bin" / tool).symlink_to(found)
    (tmp_path / "scripts/check").write_text('#!/bin/sh\necho "checked: CI=$CI $*"\n')
    (tmp_path / "scripts/check").chmod(0o755)
    made = Machine(tmp_path)
    made.has("id", script="echo 1000")
    made.has("sudo", script=f'shift; cat >/dev/null; echo "$*" >>{tmp_path}/sudo.log')
    made.has("nginx")
    return made


def test_it_can_be_run_as_it_is() -> None:
    assert (ROOT / ".ci/run").stat().st_mode & 0o111 == 0o111


def test_a_complete_machine_is_left_alone_and_checked(machine: Machine) -> None:
    machine.has(*WANTED)
    ran = machine.ci("-k", "deploy")
    assert (ran.returncode, machine.as_root) == (0, [])
    assert ran.stdout.endswith("checked: CI=true -k deploy\n")


def test_only_what_is_missing_is_installed(machine: Machine) -> None:
    machine.has(*(command for command in WANTED if command not in ("bwrap", "chromedriver")))
    ran = machine.ci()
    installed = [line for line in machine.as_root if "install" in line]
    assert len(installed) == 1
    packages = set(installed[0].partition("--no-install-recommends ")[2].split())
    assert packages - {"ca-certificates", "linux-libc-dev"} == {
        "bubblewrap",
        "chromium-driver",
    }  # files of this machine
    assert [line for line in machine.as_root if "update" in line] == ["apt-get update -qq"]
    # The package did not bring it: better no answer than one that skipped its tests.
    assert ran.returncode == 1
    assert "bwrap is still missing" in ran.stderr
    assert "checked" not in ran.stdout


def test_it_says_why_an_installation_failed(machine: Machine) -> None:
    machine.has(*WANTED[1:])
    machine.has("sudo", script="cat >/dev/null; echo 'E: no network' >&2; exit 100")
    ran = machine.ci()
    assert ran.returncode != 0
    assert "E: no network" in ran.stderr
    assert "checked" not in ran.stdout
