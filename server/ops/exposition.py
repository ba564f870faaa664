"""The metrics for Prometheus: the sum over all processes of one supervisor, and unfinished jobs from MongoDB."""

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
    "jobs_unfinished": "Jobs of the whole installation that wait or run; the same in every process: take the max",
    "jobs_oldest_seconds": "Seconds since the oldest of them was due; the same in every process: take the max",
}
JOB_LABELS = ("type", "state")


async def answer(request: web.Request, stores: Resources) -> web.Response:
    """Return the metrics in text format, to operators only."""
    for guard in operators.demand(stores.settings):
        if not await guard.authenticate(request):
            challenge: web.Response = guard.challenge()
            return challenge
    return web.Response(
        body=await asyncio.to_thread(_generated, await _jobs(stores.mongo)),
        headers={"Content-Type": prometheus_client.CONTENT_TYPE_LATEST},
    )


class Together(CollectorRegistry):
    """A registry with further metrics that no process counts."""

    def __init__(self, counted: CollectorRegistry, more: Sequence[Metric]) -> None:
        super().__init__()
        self._counted = counted
        self._more = more

    def collect(self) -> Iterable[Metric]:
        yield from self._counted.collect()
        yield from self._more


def _generated(more: Sequence[Metric]) -> bytes:
    """Render the metrics. It reads the files of all processes, so call it outside of the event loop."""
    directory = environment.metrics_folder()
    with tally.read(directory) if directory else contextlib.nullcontext(prometheus_client.REGISTRY) as counted:
        return prometheus_client.generate_latest(Together(counted, more))


async def _jobs(mongo: Any) -> list[Metric]:
    """Return the installation's jobs by type and state: 0 for none, no metrics at all during an outage of MongoDB."""
    count, oldest = (GaugeMetricFamily(name, help, labels=JOB_LABELS) for name, help in OF_JOBS.items())
    try:
        with budget(CHECK_SECONDS):
            async with answered(mongo):
                groups = await store.unfinished(mongo, now=store.moment())
    except Unavailable as error:
        log.warning("jobs not counted", error=error.detail)
        return []
    groups_by_labels = {(group.type, group.state): group for group in groups}
    for labels in dict.fromkeys((*product(JOB_TYPES, store.UNFINISHED_STATES), *groups_by_labels)):
        group = groups_by_labels.get(labels)
        count.add_metric(labels, group.number if group else 0)
        oldest.add_metric(labels, group.oldest_seconds if group else 0)
    return [count, oldest]
