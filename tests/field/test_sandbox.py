"""Faults of sandboxed programs, and of the worker that runs them, that users saw."""

from tests.conftest import MakeActor, MakeServer, environment
from tests.jobs.asking import run
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
    processes: Processes, quiet: dict[str, str], make_server: MakeServer, make_actor: MakeActor
) -> None:
    ada = await make_actor("Ada", await make_server(**quiet))
    worker = processes.worker(**environment(quiet)).ready()
    log_before = worker.output
    result = (await run(ada, FORGE))["result"]
    assert (result["stdout"], result["stderr"]) == ("", "")
    assert worker.output.startswith(log_before)
    assert "FORGED" not in worker.output
