"""What Prometheus reads: all processes of one supervisor added up, and the jobs that wait, which MongoDB knows."""

import asyncio
import contextlib
import os
from collections.abc import AsyncIterator, Iterable, Sequence
from contextlib import asynccontextmanager
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
from server.ops import operators
from server.ops.stores import CHECK_SECONDS
from server.resources import Resources, answered
from server.settings import Settings, SettingsError

log = structlog.get_logger()

OF_JOBS = {
    "jobs_unfinished": "Jobs that wait or run",
    "jobs_oldest_seconds": "How long the oldest has been due",
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


@asynccontextmanager
async def served(settings: Settings, stores: Resources) -> AsyncIterator[None]:
    """A worker's own ``/metrics`` at METRICS_PORT. Of several workers any may answer: they share the port.

    Raises:
        SettingsError: somebody else has that port.
    """
    if not settings.metrics_port or operators.are_shut_out(settings):
        yield
        return

    async def metrics(request: web.Request) -> web.Response:
        return await answer(request, stores)

    app = web.Application()
    app.router.add_get("/metrics", metrics)
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    try:
        await _listen(runner, settings)
        yield
    finally:
        await runner.cleanup()


async def _listen(runner: web.AppRunner, settings: Settings) -> None:
    try:
        await web.TCPSite(runner, settings.host, settings.metrics_port, reuse_port=True).start()
    except OSError as error:
        why = os.strerror(error.errno or 0)
        raise SettingsError(f"Cannot listen on METRICS_PORT={settings.metrics_port}: {why}") from error


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
    """Without MongoDB these are absent, not zero."""
    number, oldest = (GaugeMetricFamily(name, help, labels=JOB_LABELS) for name, help in OF_JOBS.items())
    try:
        with budget(CHECK_SECONDS):
            async with answered(mongo):
                groups = await store.unfinished(mongo, now=store.moment())
    except Unavailable as error:
        log.warning("jobs not counted", error=error.detail)
        return []
    for each in groups:
        labels = [each.type, each.state]
        number.add_metric(labels, each.number)
        oldest.add_metric(labels, each.oldest_seconds)
    return [number, oldest]
