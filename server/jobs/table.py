"""The table of job types, in the idiom of aiohttp's ``RouteTableDef``.

``@jobs.on("EXPORT", Export, timeout=300)`` decorates ``async def export(attempt, payload) -> result``. The exception
decides about a retry: a ``ServiceError`` with a status below 500 fails the job, any other exception is retried.
"""

from collections.abc import Awaitable, Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from marshmallow import Schema

from server.jobs.attempt_context import AttemptContext

JobFunction = Callable[[AttemptContext, dict[str, Any]], Awaitable[dict[str, Any]]]
LanguageSelector = Callable[[dict[str, Any]], str | None]


@dataclass(frozen=True)
class JobType:
    """A type of jobs: its schema, function and limits."""

    name: str
    schema: Schema
    run: JobFunction
    timeout: int  # seconds for one attempt
    required_language: LanguageSelector
    """Returns the language that a worker must support for this payload, as the client sent it, or None."""
    summary: str


class JobTable:
    """The job types of one module."""

    def __init__(self) -> None:
        self._types: list[JobType] = []

    def on(
        self, name: str, schema: type[Schema], *, timeout: int, required_language: LanguageSelector = lambda _: None
    ) -> Callable[[JobFunction], JobFunction]:
        def add(run: JobFunction) -> JobFunction:
            self._types.append(JobType(name, schema(), run, timeout, required_language, (run.__doc__ or "").strip()))
            return run

        return add

    def __iter__(self) -> Iterator[JobType]:
        return iter(self._types)


def merge(tables: Iterable[JobTable]) -> dict[str, JobType]:
    """Return all job types by name."""
    return {type.name: type for table in tables for type in table}
