"""The endpoint of a worker at METRICS_PORT: ``/health`` for liveness probes, ``/metrics`` for Prometheus."""

import os
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from aiohttp import web

from server import json
from server.ops import exposition, health, operators
from server.resources import Resources
from server.settings import Settings, SettingsError


@asynccontextmanager
async def serve_endpoint(settings: Settings, stores: Resources) -> AsyncIterator[None]:
    """Serve both paths during the block. Several workers share the port: any of them may respond.

    Raises:
        SettingsError: another program uses the port.
    """
    if not settings.metrics_port:
        yield
        return
    runner = web.AppRunner(_application(settings, stores), access_log=None)
    await runner.setup()
    try:
        await _listen(runner, settings)
        yield
    finally:
        await runner.cleanup()


def _application(settings: Settings, stores: Resources) -> web.Application:
    started = time.monotonic()

    async def serve_health(_: web.Request) -> web.Response:
        return web.Response(body=json.dumps(health.liveness(started_at=started)), content_type="application/json")

    async def serve_metrics(request: web.Request) -> web.Response:
        return await exposition.metrics_response(request, stores)

    app = web.Application()
    app.router.add_get("/health", serve_health)
    if not operators.disabled(settings):
        app.router.add_get("/metrics", serve_metrics)
    return app


async def _listen(runner: web.AppRunner, settings: Settings) -> None:
    try:
        await web.TCPSite(runner, settings.host, settings.metrics_port, reuse_port=True).start()
    except OSError as error:
        reason = os.strerror(error.errno or 0)
        raise SettingsError(f"Cannot listen on METRICS_PORT={settings.metrics_port}: {reason}") from error
