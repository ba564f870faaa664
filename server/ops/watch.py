"""What a process measures of itself, by looking now and then."""

import asyncio
import contextlib
import time
from collections.abc import Callable
from uuid import uuid4

from redis.exceptions import RedisError

from server import metrics
from server.errors import Unavailable
from server.ops import stores
from server.postgres import Database
from server.realtime.hub import Realtime
from server.resources import Resources

LOOK_SECONDS = 0.25
PROBE_SECONDS = 5.0


async def look(db: Database, more: Callable[[], None] = lambda: None) -> None:
    """For as long as the process lives: the loop's lag and the pool, and what ``more`` sets."""
    loop = asyncio.get_running_loop()
    while True:
        due = loop.time() + LOOK_SECONDS
        await asyncio.sleep(LOOK_SECONDS)
        metrics.LOOP_LAG.observe(max(0.0, loop.time() - due))
        size, idle = db.pool.get_size(), db.pool.get_idle_size()
        metrics.POOL_CONNECTIONS.labels("used").set(size - idle)
        metrics.POOL_CONNECTIONS.labels("idle").set(idle)
        more()


def show_sockets(realtime: Realtime) -> None:
    sent, realtime.frames_sent = realtime.frames_sent, 0
    metrics.FRAMES_OUT.inc(sent)
    metrics.SOCKETS.set(len(realtime.peers))
    metrics.ROOMS.set(realtime.room_count)
    frames, size = realtime.waiting()
    metrics.OUTBOX_FRAMES.set(frames)
    metrics.OUTBOX_BYTES.set(size)


async def ask_stores(opened: Resources) -> None:
    """For as long as the process lives: whether it can use its stores, also while nobody asks it for anything."""
    while True:
        for name, state in (await stores.check(opened)).items():
            metrics.STORE_UP.labels(name).set(state["status"] == "up")
        await asyncio.sleep(PROBE_SECONDS)


async def probe(realtime: Realtime) -> None:
    """For as long as the process lives: how long what is published takes to be heard here."""
    channel = f"probe:{uuid4().hex}"
    with contextlib.suppress(Unavailable):  # heard as soon as Redis is back
        await realtime.subscriber.subscribe(channel, _Echo())
    while True:
        with contextlib.suppress(RedisError, OSError):
            await realtime.channels.publish(channel, repr(time.monotonic()).encode())
        await asyncio.sleep(PROBE_SECONDS)


class _Echo:
    """A ``Listener``."""

    def deliver(self, _origin: str, _kind: str, payload: bytes) -> None:
        metrics.PUBLISH_LAG.observe(time.monotonic() - float(payload))

    def interrupt(self) -> None:
        """One probe is missed."""

    async def resume(self) -> None:
        """The next one is heard."""
