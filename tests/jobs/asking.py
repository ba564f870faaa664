"""Jobs as tests speak of them: ``job = await run(alice, "print(1)")``."""

from typing import Any

from tests.actors import Actor, Answer

SLEEPS = "import time\ntime.sleep({seconds})\nprint('done')"


def program(code: str = "print(6 * 7)", **payload: Any) -> dict[str, Any]:
    return {"type": "CODE_EXECUTION", "payload": {"language": "python", "code": code, **payload}}


async def ask(who: Actor, body: dict[str, Any] | None = None, **more: Any) -> dict[str, Any]:
    """A new job; a program that prints 42 where nothing else is asked for."""
    made = await who.post("/jobs", (program() if body is None else body) | more)
    assert made.status == 201, made
    job: dict[str, Any] = made["job"]
    return job


async def run(who: Actor, code: str, **payload: Any) -> dict[str, Any]:
    """The record of a program that has run."""
    return await who.finished_job((await ask(who, program(code, **payload)))["id"])


async def post_with_key(who: Actor, key: str, body: dict[str, Any] | None = None) -> Answer:
    return await who.post("/jobs", body or program(), headers={"Idempotency-Key": key})
