"""Periodic samples of a process: event loop lag, connection pool, sockets, stores, and the lag of pub/sub."""

import asyncio
import contextlib
import time
from collections.abc import Callable
from uuid import uuid4

from redis.exceptions import RedisError

from server import metrics
from server.errors import Unavailable
from server.ops import store_health
from server.postgres import Database
from server.realtime.hub import Realtime
from server.resources import Resources

SAMPLE_INTERVAL_SECONDS = 0.25
PROBE_INTERVAL_SECONDS = 5.0


async def sample(db: Database, more: Callable[[], None] = lambda: None) -> None:
    """Sample the lag of the event loop and the connection pool until cancelled; call ``more`` each time."""
    loop = asyncio.get_running_loop()
    while True:
        due = loop.time() + SAMPLE_INTERVAL_SECONDS
        await asyncio.sleep(SAMPLE_INTERVAL_SECONDS)
        metrics.LOOP_LAG.observe(max(0.0, loop.time() - due))
        size, idle = db.pool.get_size(), db.pool.get_idle_size()
        metrics.POOL_CONNECTIONS.labels("used").set(size - idle)
        metrics.POOL_CONNECTIONS.labels("idle").set(idle)
        more()


def record_socket_metrics(realtime: Realtime) -> None:
    sent, realtime.frames_sent = realtime.frames_sent, 0
    metrics.FRAMES_OUT.inc(sent)
    metrics.SOCKETS.set(len(realtime.connections))
    metrics.ROOMS.set(realtime.room_count)
    frames, size = realtime.outbox_totals()
    metrics.OUTBOX_FRAMES.set(frames)
    metrics.OUTBOX_BYTES.set(size)


async def sample_stores(stores: Resources) -> None:
    """Sample the health of the stores until cancelled, also while the process gets no requests."""
    while True:
        for name, state in (await store_health.check(stores)).items():
            metrics.STORE_UP.labels(name).set(state["status"] == "up")
        await asyncio.sleep(PROBE_INTERVAL_SECONDS)


async def probe_publish_lag(realtime: Realtime) -> None:
    """Measure until cancelled how long a published message takes until this process receives it by pub/sub."""
    channel = f"probe:{uuid4().hex}"
    with contextlib.suppress(Unavailable):  # the subscription takes effect when Redis is back
        await realtime.subscriber.subscribe(channel, _ProbeListener())
    while True:
        with contextlib.suppress(RedisError, OSError):
            await realtime.channels.publish(channel, repr(time.monotonic()).encode())
        await asyncio.sleep(PROBE_INTERVAL_SECONDS)


class _ProbeListener:
    """A listener of the probe channel that observes the lag."""

    def deliver(self, _origin: str, _kind: str, payload: bytes) -> None:
        metrics.PUBLISH_LAG.observe(time.monotonic() - float(payload))

    def on_disconnect(self) -> None:
        """Do nothing: one probe is lost."""

    async def resync(self) -> None:
        """Do nothing: the next probe arrives."""
