"""Test .ci/run on different machines; a PATH with stand-ins simulates a machine."""

import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.processes import ROOT

TOOLS = ("bash", "sh", "cat", "chmod", "dirname", "env", "head", "nproc", "uname")
WANTED = (
    "python3",
    "bwrap",
    "node",
    "npm",
    "chromium",
    "chromedriver",
    "wrk",
)  # not nginx: it may be in /usr/sbin, which .ci/run adds to PATH


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
    def sudo_commands(self) -> list[str]:
        """The commands that sudo received."""
        log = self.folder / "sudo.log"
        return log.read_text().splitlines() if log.exists() else []


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    """Return a machine whose sudo only logs its commands."""
    for folder in (".ci", "bin", "scripts"):
        (tmp_path / folder).mkdir()
    shutil.copy(ROOT / ".ci/run", tmp_path / ".ci")
    for tool in TOOLS:
        path = shutil.which(tool)
        assert path
        (tmp_path / "bin" / tool).symlink_to(path)
    (tmp_path / "scripts/check").write_text('#!/bin/sh\necho "checked: CI=$CI $*"\n')
    (tmp_path / "scripts/check").chmod(0o755)
    fake = Machine(tmp_path)
    fake.has("id", script="echo 1000")
    fake.has("sudo", script=f'shift; cat >/dev/null; echo "$*" >>{tmp_path}/sudo.log')
    fake.has("nginx")
    return fake


def test_the_script_is_executable() -> None:
    assert (ROOT / ".ci/run").stat().st_mode & 0o111 == 0o111


def test_a_complete_machine_is_not_changed_and_runs_the_checks(machine: Machine) -> None:
    machine.has(*WANTED)
    result = machine.ci("-k", "deploy")
    assert (result.returncode, machine.sudo_commands) == (0, [])
    assert result.stdout.endswith("checked: CI=true -k deploy\n")


def test_only_missing_packages_are_installed(machine: Machine) -> None:
    machine.has(*(command for command in WANTED if command not in ("bwrap", "chromedriver")))
    result = machine.ci()
    installed = [line for line in machine.sudo_commands if "install" in line]
    assert len(installed) == 1
    packages = set(installed[0].partition("--no-install-recommends ")[2].split())
    assert packages - {"ca-certificates", "linux-libc-dev"} == {
        "bubblewrap",
        "chromium-driver",
    }  # the other two depend on files of this machine
    assert [line for line in machine.sudo_commands if "update" in line] == ["apt-get update -qq"]
    # The package did not install the command: CI fails instead of skipping its tests.
    assert result.returncode == 1
    assert "bwrap is still missing" in result.stderr
    assert "checked" not in result.stdout


def test_the_error_of_a_failed_installation_is_printed(machine: Machine) -> None:
    machine.has(*WANTED[1:])
    machine.has("sudo", script="cat >/dev/null; echo 'E: no network' >&2; exit 100")
    result = machine.ci()
    assert result.returncode != 0
    assert "E: no network" in result.stderr
    assert "checked" not in result.stdout
