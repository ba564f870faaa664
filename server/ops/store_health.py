"""Health of the stores, for readiness and for periodic samples."""

import asyncio
import time
from collections.abc import Awaitable, Callable
from functools import partial
from typing import Any

from server.resources import Resources, ping

CHECK_TIMEOUT_SECONDS = 1.0


async def check(stores: Resources) -> dict[str, dict[str, Any]]:
    """Ping all stores concurrently; return state and latency in milliseconds of each."""
    pings: dict[str, Callable[[], Awaitable[Any]]] = {
        "postgresql": stores.db.ping,
        "redis": partial(ping, stores.redis),
        "mongodb": partial(stores.mongo.command, "ping"),
    }
    states = await asyncio.gather(*(_check(send_ping) for send_ping in pings.values()))
    return dict(zip(pings, states, strict=True))


async def _check(send_ping: Callable[[], Awaitable[Any]]) -> dict[str, Any]:
    started = time.perf_counter()
    try:
        async with asyncio.timeout(CHECK_TIMEOUT_SECONDS):
            await send_ping()
    except Exception as error:  # noqa: BLE001 - after any error the store is not usable; the response has its type
        return {"status": "down", "error": type(error).__name__}
    return {"status": "up", "latencyMs": round((time.perf_counter() - started) * 1000, 2)}
