"""The notifications of workers, on a network that fails."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from server.devstack.stack import Stack
from server.jobs.notifier import NOTIFICATION_CHANNEL, JobNotifier, publish_cancellation
from server.resources import blocking_redis_client, redis_client
from tests.faults import FaultyNetwork, Mode
from tests.timeouts import WAIT_TIMEOUT_SECONDS


@asynccontextmanager
async def started_notifier(url: str, cancelled: list[str]) -> AsyncIterator[JobNotifier]:
    redis = blocking_redis_client(url)
    notifier = JobNotifier(redis, on_cancel=cancelled.append)
    task = asyncio.ensure_future(notifier.listen())
    try:
        yield notifier
    finally:
        task.cancel()
        await asyncio.wait({task})
        await redis.aclose()


async def test_listener_reconnects_after_redis_stops_answering(stack: Stack) -> None:
    cancelled: list[str] = []
    redis = redis_client(stack.valkey.url)
    async with (
        FaultyNetwork.start({"redis": stack.valkey.url}) as network,
        started_notifier(network.urls["redis"], cancelled) as notifier,
    ):
        proxy = network.stores["redis"]
        await wait_for_notification(redis, notifier)
        before = proxy.connections
        await asyncio.sleep(2.5)  # pings are answered
        assert proxy.connections == before
        await proxy.set_mode(Mode.BLACK_HOLE)
        async with asyncio.timeout(WAIT_TIMEOUT_SECONDS):
            while proxy.connections == before:  # the listener has closed the old connection
                await asyncio.sleep(0.05)
        await proxy.set_mode(Mode.PASS)
        notifier.work_available.clear()
        await wait_for_notification(redis, notifier)
        await publish_cancellation(redis, job="a job")
        async with asyncio.timeout(WAIT_TIMEOUT_SECONDS):
            while cancelled != ["a job"]:
                await asyncio.sleep(0.02)
    await redis.aclose()


async def wait_for_notification(redis: object, notifier: JobNotifier) -> None:
    async with asyncio.timeout(WAIT_TIMEOUT_SECONDS):
        while not notifier.work_available.is_set():
            await redis.publish(NOTIFICATION_CHANNEL, "")  # type: ignore[attr-defined]
            await asyncio.sleep(0.05)
