"""Control groups (cgroup v2), where this process was given a part of the tree to arrange as it likes.

systemd does so for units with ``Delegate=yes``, container engines where they mount the tree writable. A group's limits
hold for all its processes together, which rlimits cannot do and a watcher does only some milliseconds later.
"""

import contextlib
import os
from pathlib import Path

NEEDED = frozenset(("memory", "pids"))
WISHED = frozenset(("cpu",))
WORKERS = "workers"  # where the processes go that were in the part's top: groups with limits may hold no process
MEBIBYTE = 1 << 20
OWN_MB = 24  # for what runs around the program; its own memory is watched besides
OWN_PROCESSES = 4
WISHES = ("memory.swap.max", "cpu.weight")  # not there where the machine has no swap, or we were not given cpu


def delegated() -> Path | None:
    """The top of our part, ready for groups with limits below it; None where there is none."""
    try:
        top = find()
        if top is None:
            return None
        workers = top / WORKERS
        workers.mkdir(exist_ok=True)
        for pid in (top / "cgroup.procs").read_text().split():
            with contextlib.suppress(ProcessLookupError):
                (workers / "cgroup.procs").write_text(pid)
        there = set((top / "cgroup.controllers").read_text().split())
        wanted = sorted(there & (NEEDED | WISHED))
        (top / "cgroup.subtree_control").write_text(" ".join(f"+{name}" for name in wanted))
    except OSError:
        return None
    return top


def find() -> Path | None:
    """The top of our part, as it is."""
    tree = mount()
    own = [line[3:] for line in Path("/proc/self/cgroup").read_text().splitlines() if line.startswith("0::")]
    if tree is None or not own or ".." in own[0]:
        return None
    group = tree / own[0].lstrip("/")
    top = group.parent if group.name == WORKERS else group  # another worker was here before us
    if not _belongs_to_us(top, tree) or not os.access(top, os.W_OK):
        return None
    return top if set((top / "cgroup.controllers").read_text().split()) >= NEEDED else None


def limits(*, memory_mb: int, processes: int) -> dict[str, str]:
    """What is written into the files of a program's group."""
    return {
        "memory.max": str((memory_mb + OWN_MB) * MEBIBYTE),
        "memory.swap.max": "0",
        "memory.oom.group": "1",
        "cpu.weight": "10",  # of the usual 100, which the workers together keep
        "pids.max": str(processes + OWN_PROCESSES),
    }


def mount() -> Path | None:
    """Where the tree is."""
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        place, _, kind = line.partition(" - ")
        if kind.startswith("cgroup2 "):
            return Path(place.split()[4])
    return None


def _belongs_to_us(top: Path, tree: Path) -> bool:
    # A file that the root of the whole machine lacks: then "/" is the root of a container.
    in_container = top == tree and (top / "cgroup.type").exists()
    return in_container or _is_marked(top)


def _is_marked(group: Path) -> bool:
    """By systemd, as delegated: what is not so marked is arranged by somebody else."""
    for name in ("user.delegate", "trusted.delegate"):
        with contextlib.suppress(OSError):
            if os.getxattr(group, name) == b"1":
                return True
    return False
