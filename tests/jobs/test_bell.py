"""The notifications of workers, on a network that fails."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from server.devstack.stack import Stack
from server.jobs.bell import BELL, Bell, tell_cancelled
from server.resources import blocking_redis_client, redis_client
from tests.faults import Mode, Network
from tests.patience import PATIENCE_SECONDS


@asynccontextmanager
async def listening(url: str, cancelled: list[str]) -> AsyncIterator[Bell]:
    redis = blocking_redis_client(url)
    bell = Bell(redis, on_cancel=cancelled.append)
    task = asyncio.ensure_future(bell.listen())
    try:
        yield bell
    finally:
        task.cancel()
        await asyncio.wait({task})
        await redis.aclose()


async def test_listener_reconnects_after_redis_stops_answering(stack: Stack) -> None:
    cancelled: list[str] = []
    redis = redis_client(stack.valkey.url)
    async with Network.to({"redis": stack.valkey.url}) as network, listening(network.urls["redis"], cancelled) as bell:
        proxy = network.stores["redis"]
        await until_heard(redis, bell)
        before = proxy.connections
        await asyncio.sleep(2.5)  # pings are answered
        assert proxy.connections == before
        await proxy.turn(Mode.BLACK_HOLE)
        async with asyncio.timeout(PATIENCE_SECONDS):
            while proxy.connections == before:  # the listener has closed the old connection
                await asyncio.sleep(0.05)
        await proxy.turn(Mode.PASS)
        bell.work.clear()
        await until_heard(redis, bell)
        await tell_cancelled(redis, job="a job")
        async with asyncio.timeout(PATIENCE_SECONDS):
            while cancelled != ["a job"]:
                await asyncio.sleep(0.02)
    await redis.aclose()


async def until_heard(redis: object, bell: Bell) -> None:
    async with asyncio.timeout(PATIENCE_SECONDS):
        while not bell.work.is_set():
            await redis.publish(BELL, "")  # type: ignore[attr-defined]
            await asyncio.sleep(0.05)
