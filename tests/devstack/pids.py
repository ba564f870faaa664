"""Processes in /proc."""

import time
from collections.abc import Iterable
from pathlib import Path


def children_of(parent: int) -> dict[str, int]:
    """Return the process ids of the children by the name of their program, or of their command of run.py."""
    pids = [int(path.name) for path in Path("/proc").iterdir() if path.name.isdigit()]
    return {_name(pid): pid for pid in pids if _status(pid)[1:2] == [str(parent)]}


def all_exited(pids: Iterable[int], *, seconds: float = 0) -> bool:
    """Wait until none of the processes runs; return False at the timeout."""
    deadline = time.monotonic() + seconds
    while any(_status(pid)[:1] not in ([], ["Z"]) for pid in pids):  # init may be slow to reap zombies
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    return True


def _status(pid: int) -> list[str]:
    """Return the fields of /proc/PID/stat from the state and the parent on; empty if there is no such process."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return []


def _name(pid: int) -> str:
    program, *arguments = Path(f"/proc/{pid}/cmdline").read_bytes().decode().rstrip("\0").split("\0")
    if Path(program).name.startswith("python"):
        program = arguments[1] if arguments[0].endswith("run.py") else arguments[0]
    return Path(program.partition(" ")[0]).name  # Valkey appends its address to its name
