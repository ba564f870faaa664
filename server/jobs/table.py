"""JobTable: the idiom of ``RouteTableDef`` for types of jobs.

``@jobs.on("EXPORT", Export, timeout=300)`` over ``async def export(job, payload) -> result``. What the function
raises decides what happens: a ``ServiceError`` fails the job, anything else is tried again.
"""

from collections.abc import Awaitable, Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from marshmallow import Schema

from server.jobs.sandbox import Sandbox
from server.resources import Resources


@dataclass(frozen=True)
class Attempt:
    """What the function of a type is given besides its payload."""

    job: str
    claim: int
    stores: Resources
    sandbox: Sandbox


Run = Callable[[Attempt, dict[str, Any]], Awaitable[dict[str, Any]]]


@dataclass(frozen=True)
class JobType:
    name: str
    schema: Schema
    run: Run
    timeout: int  # seconds for one attempt
    summary: str


class JobTable:
    def __init__(self) -> None:
        self._types: list[JobType] = []

    def on(self, name: str, schema: type[Schema], *, timeout: int) -> Callable[[Run], Run]:
        def add(run: Run) -> Run:
            self._types.append(JobType(name, schema(), run, timeout, (run.__doc__ or "").strip()))
            return run

        return add

    def __iter__(self) -> Iterator[JobType]:
        return iter(self._types)


def merge(tables: Iterable[JobTable]) -> dict[str, JobType]:
    """All types by name."""
    return {each.name: each for table in tables for each in table}
