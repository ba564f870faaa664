"""The folder in which the processes of a supervisor count together (prometheus_client's multiprocess mode).

Each process has files of its own there. What a dead one counted is added to one file of all the dead, so that the
folder does not grow with each restart. Who reads or changes it has its lock, so that nothing is missing or counted
twice in between.
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

PREFIX = "tally-"
KEPT = ("counter", "histogram")  # a dead process has nothing else any more
NEW_SECONDS = 60.0  # so young a folder may not have its owner's lock yet


@contextlib.contextmanager
def folder() -> Iterator[str]:
    """A new one, for as long as this block; those that killed supervisors have left are removed."""
    _sweep(Path(tempfile.gettempdir()))
    with tempfile.TemporaryDirectory(prefix=PREFIX) as made, _locked(made, fcntl.LOCK_EX):
        yield made


@contextlib.contextmanager
def read(folder: str) -> Iterator[CollectorRegistry]:
    """What all of them have counted, for as long as this block."""
    registry = CollectorRegistry()
    multiprocess.MultiProcessCollector(registry, path=folder)  # type: ignore[no-untyped-call]
    with _locked(f"{folder}/lock", fcntl.LOCK_SH):
        yield registry


def bury(folder: str, process: int | None) -> None:
    """A process is dead: what it counted stays counted; what it had (sockets, documents) is gone with it."""
    with _locked(f"{folder}/lock", fcntl.LOCK_EX):
        multiprocess.mark_process_dead(process, path=folder)  # type: ignore[no-untyped-call]
        for kind in KEPT:
            _add(Path(folder, f"{kind}_{process}.db"), to=Path(folder, f"{kind}_dead.db"))


def _add(counted: Path, *, to: Path) -> None:
    if not counted.exists():
        return
    total = MmapedDict(str(to))  # type: ignore[no-untyped-call]
    for key, value, stamp, _ in MmapedDict.read_all_values_from_file(str(counted)):  # type: ignore[no-untyped-call]
        total.write_value(key, total.read_value(key)[0] + value, stamp)  # type: ignore[no-untyped-call]
    total.close()  # type: ignore[no-untyped-call]
    counted.unlink()


def _sweep(place: Path) -> None:
    for each in place.glob(f"{PREFIX}*"):
        with contextlib.suppress(OSError):  # another user's, another's at this moment, or in use
            if time.time() - each.stat().st_mtime > NEW_SECONDS:
                with _locked(str(each), fcntl.LOCK_EX | fcntl.LOCK_NB):
                    shutil.rmtree(each)


@contextlib.contextmanager
def _locked(path: str, how: int) -> Iterator[None]:
    descriptor = os.open(path, os.O_RDONLY | (0 if Path(path).is_dir() else os.O_CREAT), 0o600)
    try:
        fcntl.flock(descriptor, how)
        yield
    finally:
        os.close(descriptor)
