"""Requests of tests about jobs: ``job = await run_program(alice, "print(1)")``."""

from typing import Any

from tests.actors import Actor, Response

SLEEP_PROGRAM = "import time\ntime.sleep({seconds})\nprint('done')"


def program_job(code: str = "print(6 * 7)", **payload: Any) -> dict[str, Any]:
    return {"type": "CODE_EXECUTION", "payload": {"language": "python", "code": code, **payload}}


async def submit_job(actor: Actor, body: dict[str, Any] | None = None, **more: Any) -> dict[str, Any]:
    """Submit a job, by default a program that prints 42, and return its record."""
    response = await actor.post("/jobs", (program_job() if body is None else body) | more)
    assert response.status == 201, response
    job: dict[str, Any] = response["job"]
    return job


async def run_program(actor: Actor, code: str, **payload: Any) -> dict[str, Any]:
    """Run a program and return the record of its finished job."""
    return await actor.finished_job((await submit_job(actor, program_job(code, **payload)))["id"])


async def submit_with_key(actor: Actor, key: str, body: dict[str, Any] | None = None) -> Response:
    return await actor.post("/jobs", body or program_job(), headers={"Idempotency-Key": key})
