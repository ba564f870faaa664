"""Control groups (cgroup v2), if a subtree is delegated to this process.

systemd delegates one to units with ``Delegate=yes``, container engines by mounting the tree writable. A group's limits
apply to all its processes together; rlimits cannot do that, and a watchdog does it only some milliseconds later.
"""

import contextlib
import os
from pathlib import Path

REQUIRED_CONTROLLERS = frozenset(("memory", "pids"))
OPTIONAL_CONTROLLERS = frozenset(("cpu",))
WORKERS_GROUP = "workers"  # takes the processes of the top group: a group with limited subgroups may hold no process
MEBIBYTE = 1 << 20
OVERHEAD_MB = 24  # for the processes around the program; the watchdog limits the program's own memory
OVERHEAD_PROCESSES = 4
OPTIONAL_LIMITS = ("memory.swap.max", "cpu.weight")  # missing if the machine has no swap, or cpu is not delegated


def prepare_delegated_group() -> Path | None:
    """Return the delegated group, prepared for limited groups below it, or None if there is none."""
    try:
        top = find_delegated_group()
        if top is None:
            return None
        workers = top / WORKERS_GROUP
        workers.mkdir(exist_ok=True)
        for pid in (top / "cgroup.procs").read_text().split():
            with contextlib.suppress(ProcessLookupError):
                (workers / "cgroup.procs").write_text(pid)
        available = set((top / "cgroup.controllers").read_text().split())
        enabled = sorted(available & (REQUIRED_CONTROLLERS | OPTIONAL_CONTROLLERS))
        (top / "cgroup.subtree_control").write_text(" ".join(f"+{name}" for name in enabled))
    except OSError:
        return None
    return top


def find_delegated_group() -> Path | None:
    """Return the delegated group as it is, or None if there is none."""
    tree = find_mount_point()
    paths = [line[3:] for line in Path("/proc/self/cgroup").read_text().splitlines() if line.startswith("0::")]
    if tree is None or not paths or ".." in paths[0]:
        return None
    group = tree / paths[0].lstrip("/")
    top = group.parent if group.name == WORKERS_GROUP else group  # another worker has moved this process
    if not _is_delegated(top, tree) or not os.access(top, os.W_OK):
        return None
    return top if set((top / "cgroup.controllers").read_text().split()) >= REQUIRED_CONTROLLERS else None


def group_limits(*, memory_mb: int, processes: int) -> dict[str, str]:
    """Return the contents of the files of a program's group, by file name."""
    return {
        "memory.max": str((memory_mb + OVERHEAD_MB) * MEBIBYTE),
        "memory.swap.max": "0",
        "memory.oom.group": "1",
        "cpu.weight": "10",  # the default is 100, which the workers together keep
        "pids.max": str(processes + OVERHEAD_PROCESSES),
    }


def find_mount_point() -> Path | None:
    """Return the mount point of the cgroup v2 tree, or None."""
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        mount_fields, _, file_system = line.partition(" - ")
        if file_system.startswith("cgroup2 "):
            return Path(mount_fields.split()[4])
    return None


def _is_delegated(top: Path, tree: Path) -> bool:
    # The root group of a machine has no cgroup.type: if "/" has one, it is the root of a container.
    in_container = top == tree and (top / "cgroup.type").exists()
    return in_container or _has_delegate_attribute(top)


def _has_delegate_attribute(group: Path) -> bool:
    """Return whether systemd marks the group as delegated: another process manages a group without the mark."""
    for name in ("user.delegate", "trusted.delegate"):
        with contextlib.suppress(OSError):
            if os.getxattr(group, name) == b"1":
                return True
    return False
