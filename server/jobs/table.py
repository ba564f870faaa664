"""JobTable: the idiom of ``RouteTableDef`` for types of jobs.

``@jobs.on("EXPORT", Export, timeout=300)`` over ``async def export(job, payload) -> result``. What the function
raises decides what happens: a ``ServiceError`` fails the job, anything else is tried again.
"""

from collections.abc import Awaitable, Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from marshmallow import Schema

from server.jobs.attempt import Attempt

Run = Callable[[Attempt, dict[str, Any]], Awaitable[dict[str, Any]]]
Needs = Callable[[dict[str, Any]], str | None]


@dataclass(frozen=True)
class JobType:
    name: str
    schema: Schema
    run: Run
    timeout: int  # seconds for one attempt
    needs: Needs
    """The language that a worker must have for this payload, as it was sent; None where any worker will do."""
    summary: str


class JobTable:
    def __init__(self) -> None:
        self._types: list[JobType] = []

    def on(
        self, name: str, schema: type[Schema], *, timeout: int, needs: Needs = lambda _: None
    ) -> Callable[[Run], Run]:
        def add(run: Run) -> Run:
            self._types.append(JobType(name, schema(), run, timeout, needs, (run.__doc__ or "").strip()))
            return run

        return add

    def __iter__(self) -> Iterator[JobType]:
        return iter(self._types)


def merge(tables: Iterable[JobTable]) -> dict[str, JobType]:
    """All types by name."""
    return {each.name: each for table in tables for each in table}
