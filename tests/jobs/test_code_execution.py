"""CODE_EXECUTION, end to end: with a server, a queue, a real worker process and its sandbox."""

import pytest

from tests.actors import Actor
from tests.jobs.requests import program_job, run_program

pytestmark = pytest.mark.usefixtures("worker")


async def test_a_program_runs_and_its_output_is_in_the_record(alice: Actor) -> None:
    code = "import sys\nprint(sys.argv[1:], input())\nprint('oh', file=sys.stderr)"
    done = await run_program(alice, code, stdin="héllo\n", args=["a", "b c"])
    assert (done["status"], done["attempts"], done["progress"], done["error"]) == ("completed", 1, 100, None)
    result = done["result"]
    assert (result["stdout"], result["stderr"]) == ("['a', 'b c'] héllo\n", "oh\n")
    assert (result["exitCode"], result["signal"], result["timedOut"], result["truncated"]) == (0, None, False, False)
    assert result["sandbox"] != "none"
    assert done["createdAt"] <= done["startedAt"] <= done["completedAt"]
    [attempt] = done["history"]
    assert (attempt["attempt"], attempt["error"]) == (1, None)
    assert attempt["workerId"]


async def test_a_program_that_exits_non_zero_is_a_completed_job(alice: Actor) -> None:
    done = await run_program(alice, "raise SystemExit(3)")
    assert (done["status"], done["result"]["exitCode"]) == ("completed", 3)


async def test_program_that_times_out_is_a_completed_job(alice: Actor) -> None:
    done = await run_program(alice, "print('begun', flush=True)\nwhile True: pass", timeoutSeconds=8)
    assert (done["status"], done["result"]["timedOut"], done["result"]["stdout"]) == ("completed", True, "begun\n")


async def test_output_is_truncated_at_one_mebibyte(alice: Actor) -> None:
    done = await run_program(alice, "print('x' * (3 << 20))")
    assert (len(done["result"]["stdout"]), done["result"]["truncated"]) == (1 << 20, True)


@pytest.mark.parametrize(
    ("payload", "field"),
    [
        ({"language": "cobol", "code": "x"}, "payload.language"),
        ({"language": "python"}, "payload.code"),
        ({"language": "python", "code": 1}, "payload.code"),
        ({"language": "python", "code": "x", "timeoutSeconds": 61}, "payload.timeoutSeconds"),
        ({"language": "python", "code": "x", "memoryMb": 513}, "payload.memoryMb"),
        ({"language": "python", "code": "x", "shell": True}, "payload.shell"),
        ({"language": "python", "code": "x", "args": [1]}, "payload.args.0"),
    ],
)
async def test_invalid_payload_is_rejected_on_submission(alice: Actor, payload: dict, field: str) -> None:
    refused = await alice.post("/jobs", {"type": "CODE_EXECUTION", "payload": payload})
    assert (refused.status, refused.code) == (422, "validation_failed")
    assert [detail["field"] for detail in refused["details"]] == [field]


@pytest.mark.parametrize(
    "change", [{"type": "MINING"}, {"priority": 0}, {"priority": 11}, {"priority": "5"}, {"runAt": "soon"}, {"more": 1}]
)
async def test_invalid_request_is_rejected(alice: Actor, change: dict) -> None:
    refused = await alice.post("/jobs", program_job() | change)
    assert (refused.status, refused.code) == (422, "validation_failed")
    assert [detail["field"] for detail in refused["details"]] == list(change)
