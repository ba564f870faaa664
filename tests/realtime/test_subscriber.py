"""The Redis subscriber of a process, without sockets."""

import asyncio

import pytest

from server.realtime.subscriber import Subscriber
from server.resources import blocking_redis_client
from server.settings import Settings
from tests.listeners import NullListener


async def test_unsubscribing_during_a_redis_outage_leaves_no_state_behind(settings: Settings) -> None:
    listener, redis = NullListener(), blocking_redis_client(settings.redis_url)
    subscriber = Subscriber(redis, channel="test", control=listener, recheck_all=listener.resync)  # it never connects
    for number in range(3):
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.01):
                await subscriber.subscribe(f"document:{number}", listener)
        subscriber.unsubscribe(f"document:{number}", listener)
    assert not subscriber._confirmations
    await redis.aclose()
