"""Tiers: ways to confine a program, from best to worst, and the launcher's configuration for each."""

import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from server.jobs import cgroups
from server.jobs.languages import Language, Program

SANDBOX_CHILD = Path(__file__).parent / "sandbox_child.py"
SYSTEM_PATHS = ("/usr", "/bin", "/sbin", "/lib", "/lib32", "/lib64")
READABLE_PATHS = (
    "/etc/ld.so.cache",
    "/etc/localtime",
    "/etc/alternatives",
    "/etc/ssl/openssl.cnf",  # for node
)
DEVICE_PATHS = tuple(f"/dev/{name}" for name in ("null", "zero", "full", "random", "urandom"))
BWRAP_PATH = "/usr/bin/bwrap"
BWRAP_HOME, BWRAP_FILES, BWRAP_CHILD = "/job/work", "/job/files", "/sandbox_child.py"
MAX_TEMPORARY_BYTES = 16 << 20
NAMESPACES = ("user", "pid", "net", "ipc", "uts", "cgroup-try")


@dataclass(frozen=True)
class Tier:
    """A way to confine programs. If the worker is root, each program has its own user in every tier."""

    name: str
    users: tuple[str, ...]  # the users whose workers may use it
    bubblewrap: bool = False
    cgroup: bool = False
    namespaces: bool = False


ROOT, UNPRIVILEGED = "root", "unprivileged"
BWRAP_CGROUP = Tier("bwrap-cgroup", (ROOT, UNPRIVILEGED), bubblewrap=True, cgroup=True)
BWRAP = Tier("bwrap", (ROOT, UNPRIVILEGED), bubblewrap=True)
LANDLOCK_UID = Tier("landlock-uid", (ROOT,), namespaces=True)
LANDLOCK = Tier("landlock", (UNPRIVILEGED,), namespaces=True)
LANDLOCK_BARE = Tier("landlock-bare", (UNPRIVILEGED,))
TIERS = (BWRAP_CGROUP, BWRAP, LANDLOCK_UID, LANDLOCK, LANDLOCK_BARE)
"""From best to worst."""
NO_TIER = Tier("none", ())


def tiers_for_current_user() -> tuple[Tier, ...]:
    """Return the tiers for the user of this process."""
    user = ROOT if os.geteuid() == 0 else UNPRIVILEGED
    return tuple(tier for tier in TIERS if user in tier.users)


def missing_package(tier: Tier) -> str | None:
    """Return the package that a tier needs and the machine lacks, and how to install it, or None."""
    if tier.bubblewrap and not Path(BWRAP_PATH).exists():
        return "bubblewrap is not installed: apt-get install bubblewrap"
    return None


def launcher_config(
    root: Path, program: Program, tier: Tier, *, uid: int | None, python: Language, cgroup: Path | None
) -> dict[str, Any]:
    """Return the launcher's configuration for a program.

    ``root`` is the job's directory, ``uid`` a user for this job alone, ``python`` the interpreter that runs
    ``sandbox_child.py``, ``cgroup`` the group below which the launcher creates the program's group.
    """
    language, limits, work = program.language, program.limits, root / "work"
    home, temporary = (BWRAP_HOME, "/tmp") if tier.bubblewrap else (str(work), str(work))  # noqa: S108 - its own
    return {
        "work": str(work),
        "directory": str(work),
        "stdin": str(root / "stdin") if program.stdin else os.devnull,
        "command": [*language.command, *language.options(limits.memory_mb), language.file, *program.args],
        "environment": {
            "PATH": "/usr/local/bin:/usr/bin:/bin",
            "HOME": home,
            "TMPDIR": temporary,
            "LANG": "C.UTF-8",
        },
        "uid": uid,
        "namespaces": tier.namespaces,
        "rules": [] if tier.bubblewrap else _landlock_rules(root, language),
        "bubblewrap": _bubblewrap_command(root, {language.command[0], python.command[0]}) if tier.bubblewrap else [],
        "child": [python.command[0], "-I", "-S", BWRAP_CHILD],
        "timeout": limits.timeout_seconds,
        "cpuSeconds": 2 * limits.timeout_seconds + 1,  # per process; several threads use more CPU time than real time
        "memoryMb": limits.memory_mb,
        "addressSpaceMb": language.address_space_mb(limits.memory_mb),
        "processes": limits.processes,
        "fileMb": limits.file_mb,
        "diskMb": limits.disk_mb,
        "openFiles": limits.open_files,
        "cgroup": str(cgroup / root.name) if cgroup else None,
        "cgroupLimits": cgroups.group_limits(memory_mb=limits.memory_mb, processes=limits.processes),
        "cgroupOptionalLimits": cgroups.OPTIONAL_LIMITS,
    }


def _interpreter_paths(interpreters: Iterable[str]) -> list[str]:
    """Return the program and library directories of interpreters outside the system's directories.

    Not their whole prefix: it may be the home of a user.
    """
    prefixes = {Path(interpreter).parent.parent for interpreter in interpreters}
    foreign = sorted(prefix for prefix in prefixes if prefix != Path("/") and not prefix.is_relative_to("/usr"))
    return [str(prefix / name) for prefix in foreign for name in ("bin", "lib", "lib64")]


def _landlock_rules(root: Path, language: Language) -> list[tuple[str, str]]:
    """Return the accessible paths: the system's programs and libraries, harmless devices, and the job's directory."""
    return [
        *((path, "read") for path in (*SYSTEM_PATHS, *READABLE_PATHS, *_interpreter_paths(language.command[:1]))),
        *((path, "device") for path in DEVICE_PATHS),
        (str(root / "files"), "list"),
        (str(root / "work"), "write"),
    ]


def _bubblewrap_command(root: Path, interpreters: Iterable[str]) -> list[str]:
    """Return the bubblewrap command for the same paths; the launcher adds the filter and the program."""
    command = [BWRAP_PATH, *(f"--unshare-{space}" for space in NAMESPACES), "--disable-userns"]
    command += ["--die-with-parent", "--new-session", "--as-pid-1", "--cap-drop", "ALL", "--clearenv"]
    command += ["--hostname", "sandbox"]
    for path in SYSTEM_PATHS:
        if Path(path).is_symlink():
            command += ["--symlink", str(Path(path).readlink()), path]
        else:
            command += ["--ro-bind-try", path, path]
    for path in (*READABLE_PATHS, *_interpreter_paths(interpreters)):
        command += ["--ro-bind-try", path, path]
    command += ["--dev", "/dev", "--remount-ro", "/dev", "--proc", "/proc"]
    command += ["--size", str(MAX_TEMPORARY_BYTES), "--tmpfs", "/tmp"]  # noqa: S108 - its own
    command += ["--ro-bind", str(SANDBOX_CHILD), BWRAP_CHILD, "--ro-bind", str(root / "files"), BWRAP_FILES]
    return [*command, "--bind", str(root / "work"), BWRAP_HOME, "--chdir", BWRAP_HOME, "--remount-ro", "/"]
