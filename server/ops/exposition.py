"""What Prometheus reads: all processes of one supervisor added up, and the jobs that wait, which MongoDB knows."""

import asyncio
import contextlib
from collections.abc import Iterable, Sequence
from itertools import product
from typing import Any

import prometheus_client
import structlog
from aiohttp import web
from prometheus_client import CollectorRegistry
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.metrics_core import Metric

from server import settings as environment
from server import tally
from server.budget import budget
from server.errors import Unavailable
from server.jobs import store
from server.jobs.types import JOB_TYPES
from server.ops import operators
from server.ops.stores import CHECK_SECONDS
from server.resources import Resources, answered

log = structlog.get_logger()

OF_JOBS = {
    "jobs_unfinished": "Jobs of the whole installation that wait or run: every process tells the same, take the max",
    "jobs_oldest_seconds": "How long the oldest of them has been due: take the max",
}
JOB_LABELS = ("type", "state")


async def answer(request: web.Request, stores: Resources) -> web.Response:
    """The text format, for operators only."""
    for guard in operators.demand(stores.settings):
        if not await guard.authenticate(request):
            challenge: web.Response = guard.challenge()
            return challenge
    return web.Response(
        body=await asyncio.to_thread(_generated, await _jobs(stores.mongo)),
        headers={"Content-Type": prometheus_client.CONTENT_TYPE_LATEST},
    )


class Together(CollectorRegistry):
    """A registry, and further samples that no process counts."""

    def __init__(self, counted: CollectorRegistry, more: Sequence[Metric]) -> None:
        super().__init__()
        self._counted = counted
        self._more = more

    def collect(self) -> Iterable[Metric]:
        yield from self._counted.collect()
        yield from self._more


def _generated(more: Sequence[Metric]) -> bytes:
    """Reads files of all processes: not for the loop."""
    folder = environment.metrics_folder()
    with tally.read(folder) if folder else contextlib.nullcontext(prometheus_client.REGISTRY) as counted:
        return prometheus_client.generate_latest(Together(counted, more))


async def _jobs(mongo: Any) -> list[Metric]:
    """Ask for the installation's jobs by type and state: 0 where there are none, and absent while MongoDB is away."""
    number, oldest = (GaugeMetricFamily(name, help, labels=JOB_LABELS) for name, help in OF_JOBS.items())
    try:
        with budget(CHECK_SECONDS):
            async with answered(mongo):
                groups = await store.unfinished(mongo, now=store.moment())
    except Unavailable as error:
        log.warning("jobs not counted", error=error.detail)
        return []
    found = {(group.type, group.state): group for group in groups}
    for labels in dict.fromkeys((*product(JOB_TYPES, store.UNFINISHED_STATES), *found)):
        group = found.get(labels)
        number.add_metric(labels, group.number if group else 0)
        oldest.add_metric(labels, group.oldest_seconds if group else 0)
    return [number, oldest]
