"""Whether each store answers: what readiness tells, and what is measured now and then."""

import asyncio
import time
from collections.abc import Awaitable, Callable
from functools import partial
from typing import Any

from server.resources import Resources, ping

CHECK_SECONDS = 1.0


async def check(stores: Resources) -> dict[str, dict[str, Any]]:
    """State and latency in milliseconds of each, asked at once."""
    pings: dict[str, Callable[[], Awaitable[Any]]] = {
        "postgresql": stores.db.ping,
        "redis": partial(ping, stores.redis),
        "mongodb": partial(stores.mongo.command, "ping"),
    }
    states = await asyncio.gather(*(_check(each) for each in pings.values()))
    return dict(zip(pings, states, strict=True))


async def _check(ask: Callable[[], Awaitable[Any]]) -> dict[str, Any]:
    started = time.perf_counter()
    try:
        async with asyncio.timeout(CHECK_SECONDS):
            await ask()
    except Exception as error:  # noqa: BLE001 - whatever it is, the store is not usable; the kind is told
        return {"status": "down", "error": type(error).__name__}
    return {"status": "up", "latencyMs": round((time.perf_counter() - started) * 1000, 2)}
