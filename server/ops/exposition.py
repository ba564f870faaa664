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

from server import multiprocess_metrics, settings
from server.deadline import store_deadline
from server.errors import Unavailable
from server.jobs import store
from server.jobs.types import JOB_TYPES
from server.ops import operators
from server.ops.store_health import CHECK_TIMEOUT_SECONDS
from server.resources import Resources, translate_mongo_errors

log = structlog.get_logger()

JOB_METRICS = {
    "jobs_unfinished": "Jobs of the whole installation that wait or run; the same in every process: take the max",
    "jobs_oldest_seconds": "Seconds since the oldest of them was due; the same in every process: take the max",
}
JOB_LABELS = ("type", "state")


async def metrics_response(request: web.Request, stores: Resources) -> web.Response:
    """Return the metrics in text format, to operators only."""
    for guard in operators.basic_auth(stores.settings):
        if not await guard.authenticate(request):
            challenge: web.Response = guard.challenge()
            return challenge
    return web.Response(
        body=await asyncio.to_thread(_render_metrics, await _job_metrics(stores.mongo)),
        headers={"Content-Type": prometheus_client.CONTENT_TYPE_LATEST},
    )


class CombinedRegistry(CollectorRegistry):
    """The metrics of a registry and further ones, which are read from a store at each scrape."""

    def __init__(self, counted: CollectorRegistry, more: Sequence[Metric]) -> None:
        super().__init__()
        self._counted = counted
        self._more = more

    def collect(self) -> Iterable[Metric]:
        yield from self._counted.collect()
        yield from self._more


def _render_metrics(more: Sequence[Metric]) -> bytes:
    """Render the metrics. It reads the files of all processes, so call it outside of the event loop."""
    directory = settings.multiproc_dir()
    with (
        multiprocess_metrics.locked_registry(directory)
        if directory
        else contextlib.nullcontext(prometheus_client.REGISTRY) as counted
    ):
        return prometheus_client.generate_latest(CombinedRegistry(counted, more))


async def _job_metrics(mongo: Any) -> list[Metric]:
    """Return the installation's jobs by type and state: 0 for none, no metrics at all during an outage of MongoDB."""
    count, oldest = (GaugeMetricFamily(name, help, labels=JOB_LABELS) for name, help in JOB_METRICS.items())
    try:
        with store_deadline(CHECK_TIMEOUT_SECONDS):
            async with translate_mongo_errors(mongo):
                groups = await store.count_unfinished(mongo, now=store.mongo_now())
    except Unavailable as error:
        log.warning("job metrics unavailable", error=error.detail)
        return []
    groups_by_labels = {(group.type, group.state): group for group in groups}
    for labels in dict.fromkeys((*product(JOB_TYPES, store.UNFINISHED_STATES), *groups_by_labels)):
        group = groups_by_labels.get(labels)
        count.add_metric(labels, group.count if group else 0)
        oldest.add_metric(labels, group.oldest_seconds if group else 0)
    return [count, oldest]
