"""Faults of sandboxed programs, and of the worker that runs them, that users saw."""

from tests.conftest import MakeActor, MakeServer, environment_of
from tests.jobs.requests import run_program
from tests.processes import Processes

FORGE = """
import os
for number in range(3, 256):
    try: os.write(number, b"FORGED\\n"); print("written to", number)
    except OSError: pass
    try: os.ftruncate(number, 0); print("cut", number)
    except OSError: pass
"""


async def test_a_program_forged_and_truncated_the_log_of_its_worker(
    processes: Processes, isolated_stores: dict[str, str], make_server: MakeServer, make_actor: MakeActor
) -> None:
    ada = await make_actor("Ada", await make_server(**isolated_stores))
    worker = processes.worker(**environment_of(isolated_stores)).ready()
    log_before = worker.output
    result = (await run_program(ada, FORGE))["result"]
    assert (result["stdout"], result["stderr"]) == ("", "")
    assert worker.output.startswith(log_before)
    assert "FORGED" not in worker.output
