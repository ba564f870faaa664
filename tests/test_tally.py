"""What processes of a supervisor count together: nothing is lost with a process, and nothing piles up."""

import os
import subprocess
import sys
import time
from pathlib import Path

from server import tally

COUNTS = """
import sys
from server import metrics
metrics.DOCUMENTS_LOADED.inc(3)
metrics.DOCUMENT_COMMITS.observe(0.2)
metrics.SOCKETS.set(5)
print(flush=True)
sys.stdin.read()
"""


def counted(folder: str, name: str) -> float:
    with tally.read(folder) as registry:
        samples = [sample for family in registry.collect() for sample in family.samples if sample.name == name]
    return sum(sample.value for sample in samples)


def one_that_counts(folder: str) -> "subprocess.Popen[bytes]":
    process = subprocess.Popen(
        [sys.executable, "-c", COUNTS],
        env={**os.environ, "PROMETHEUS_MULTIPROC_DIR": folder},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    assert process.stdout
    process.stdout.readline()
    return process


def test_what_the_dead_counted_stays_in_one_file_however_many_they_are() -> None:
    sizes = []
    with tally.folder() as folder:
        for dead in range(1, 4):
            with one_that_counts(folder) as process:
                assert counted(folder, "documents_loaded_total") == 3 * dead
                assert counted(folder, "websocket_connections") == 5
                process.kill()
            tally.bury(folder, process.pid)
            assert counted(folder, "documents_loaded_total") == 3 * dead
            assert counted(folder, "document_commit_seconds_count") == dead
            assert counted(folder, "websocket_connections") == 0
            sizes.append(len(list(Path(folder).iterdir())))
    assert len(set(sizes)) == 1
    assert not Path(folder).exists()


KEEPS = "from server import tally\nwith tally.folder() as made:\n    print(made, flush=True)\n    input()"


def test_the_folder_of_a_killed_supervisor_is_removed_at_the_next_start_and_that_of_a_living_one_is_not() -> None:
    made = []
    owners = []
    for _ in range(2):
        owner = subprocess.Popen(
            [sys.executable, "-c", KEEPS], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        owners.append(owner)
        assert owner.stdout
        made.append(Path(owner.stdout.readline().strip()))
    killed, living = owners
    killed.kill()
    killed.communicate()
    for folder in made:
        os.utime(folder, (time.time() - 3600,) * 2)
    with tally.folder():
        assert [folder.exists() for folder in made] == [False, True]
    living.communicate("\n")
    assert not made[1].exists()
