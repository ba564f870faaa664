"""The directory of the metrics of a supervisor's processes (prometheus_client's multiprocess mode).

Each process has its own files there. The counts of a dead process are added to one file for all dead processes, so
that the directory does not grow with each restart. Readers and writers take its lock, so that no count is missing or
counted twice in between.
"""

import contextlib
import fcntl
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from prometheus_client import CollectorRegistry, multiprocess
from prometheus_client.mmap_dict import MmapedDict

DIR_PREFIX = "tally-"
PERSISTENT_TYPES = ("counter", "histogram")  # the values of a dead process that stay valid
MIN_STALE_SECONDS = 60.0  # a younger directory may not have the lock of its owner yet


@contextlib.contextmanager
def multiproc_dir() -> Iterator[str]:
    """Make the directory for the time of the block; remove those that killed supervisors have left behind."""
    _remove_stale_dirs(Path(tempfile.gettempdir()))
    with tempfile.TemporaryDirectory(prefix=DIR_PREFIX) as path, _locked(path, fcntl.LOCK_EX):
        yield path


@contextlib.contextmanager
def locked_registry(directory: str) -> Iterator[CollectorRegistry]:
    """Yield a registry with the counts of all processes, locked for the time of the block."""
    registry = CollectorRegistry()
    multiprocess.MultiProcessCollector(registry, path=directory)  # type: ignore[no-untyped-call]
    with _locked(f"{directory}/lock", fcntl.LOCK_SH):
        yield registry


def remove_dead_process(directory: str, pid: int | None) -> None:
    """Merge the counters of a dead process; drop its gauges (open sockets, documents)."""
    with _locked(f"{directory}/lock", fcntl.LOCK_EX):
        multiprocess.mark_process_dead(pid, path=directory)  # type: ignore[no-untyped-call]
        for kind in PERSISTENT_TYPES:
            _merge_file(Path(directory, f"{kind}_{pid}.db"), to=Path(directory, f"{kind}_dead.db"))


def _merge_file(counted: Path, *, to: Path) -> None:
    if not counted.exists():
        return
    total = MmapedDict(str(to))  # type: ignore[no-untyped-call]
    for key, value, stamp, _ in MmapedDict.read_all_values_from_file(str(counted)):  # type: ignore[no-untyped-call]
        total.write_value(key, total.read_value(key)[0] + value, stamp)  # type: ignore[no-untyped-call]
    total.close()  # type: ignore[no-untyped-call]
    counted.unlink()


def _remove_stale_dirs(parent: Path) -> None:
    for directory in parent.glob(f"{DIR_PREFIX}*"):
        with contextlib.suppress(OSError):  # another user owns it, it is in use, or it was just removed
            if time.time() - directory.stat().st_mtime > MIN_STALE_SECONDS:
                with _locked(str(directory), fcntl.LOCK_EX | fcntl.LOCK_NB):
                    shutil.rmtree(directory)


@contextlib.contextmanager
def _locked(path: str, operation: int) -> Iterator[None]:
    descriptor = os.open(path, os.O_RDONLY | (0 if Path(path).is_dir() else os.O_CREAT), 0o600)
    try:
        fcntl.flock(descriptor, operation)
        yield
    finally:
        os.close(descriptor)
