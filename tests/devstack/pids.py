"""Processes as /proc shows them."""

import time
from collections.abc import Iterable
from pathlib import Path


def children_of(parent: int) -> dict[str, int]:
    """Their process numbers by name: of a program, or of a command of run.py."""
    pids = [int(path.name) for path in Path("/proc").iterdir() if path.name.isdigit()]
    return {_name(pid): pid for pid in pids if _status(pid)[1:2] == [str(parent)]}


def gone(pids: Iterable[int], *, seconds: float = 0) -> bool:
    """Whether none of them runs, at the latest after so many seconds."""
    deadline = time.monotonic() + seconds
    while any(_status(pid)[:1] not in ([], ["Z"]) for pid in pids):  # init may be slow to collect the dead
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    return True


def _status(pid: int) -> list[str]:
    """State, parent and what follows in /proc/PID/stat; empty where there is no such process."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return []


def _name(pid: int) -> str:
    program, *arguments = Path(f"/proc/{pid}/cmdline").read_bytes().decode().rstrip("\0").split("\0")
    if Path(program).name.startswith("python"):
        program = arguments[1] if arguments[0].endswith("run.py") else arguments[0]
    return Path(program.partition(" ")[0]).name  # Valkey shows its address behind its name
