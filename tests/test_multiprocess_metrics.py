"""Metrics of the processes of a supervisor: no count is lost with a process, and no files pile up."""

import os
import subprocess
import sys
import time
from pathlib import Path

from server import multiprocess_metrics

COUNTS = """
import sys
from server import metrics
metrics.DOCUMENTS_LOADED.inc(3)
metrics.DOCUMENT_COMMITS.observe(0.2)
metrics.SOCKETS.set(5)
print(flush=True)
sys.stdin.read()
"""


def counted(directory: str, name: str) -> float:
    with multiprocess_metrics.locked_registry(directory) as registry:
        samples = [sample for family in registry.collect() for sample in family.samples if sample.name == name]
    return sum(sample.value for sample in samples)


def one_that_counts(directory: str) -> "subprocess.Popen[bytes]":
    process = subprocess.Popen(
        [sys.executable, "-c", COUNTS],
        env={**os.environ, "PROMETHEUS_MULTIPROC_DIR": directory},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    assert process.stdout
    process.stdout.readline()
    return process


def test_counts_of_dead_processes_stay_in_one_file() -> None:
    sizes = []
    with multiprocess_metrics.multiproc_dir() as directory:
        for dead in range(1, 4):
            with one_that_counts(directory) as process:
                assert counted(directory, "documents_loaded_total") == 3 * dead
                assert counted(directory, "websocket_connections") == 5
                process.kill()
            multiprocess_metrics.remove_dead_process(directory, process.pid)
            assert counted(directory, "documents_loaded_total") == 3 * dead
            assert counted(directory, "document_commit_seconds_count") == dead
            assert counted(directory, "websocket_connections") == 0
            sizes.append(len(list(Path(directory).iterdir())))
    assert len(set(sizes)) == 1
    assert not Path(directory).exists()


KEEPS = """
from server import multiprocess_metrics
with multiprocess_metrics.multiproc_dir() as made:
    print(made, flush=True)
    input()
"""


def test_directory_of_a_killed_supervisor_is_removed_at_the_next_start_but_one_in_use_is_not() -> None:
    directories = []
    owners = []
    for _ in range(2):
        owner = subprocess.Popen(
            [sys.executable, "-c", KEEPS], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        owners.append(owner)
        assert owner.stdout
        directories.append(Path(owner.stdout.readline().strip()))
    killed, running = owners
    killed.kill()
    killed.communicate()
    for directory in directories:
        os.utime(directory, (time.time() - 3600,) * 2)
    with multiprocess_metrics.multiproc_dir():
        assert [directory.exists() for directory in directories] == [False, True]
    running.communicate("\n")
    assert not directories[1].exists()
