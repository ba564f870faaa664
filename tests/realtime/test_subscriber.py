"""What a process hears from Redis, below the sockets."""

import asyncio

import pytest

from server.realtime.subscriber import Subscriber
from server.resources import blocking_redis_client
from server.settings import Settings
from tests.listeners import Nobody


async def test_a_channel_that_is_left_while_redis_is_away_leaves_nothing_behind(settings: Settings) -> None:
    nobody, redis = Nobody(), blocking_redis_client(settings.redis_url)
    subscriber = Subscriber(redis, channel="test", control=nobody, vouch=nobody.resume)  # it never connects
    for number in range(3):
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.01):
                await subscriber.subscribe(f"document:{number}", nobody)
        subscriber.unsubscribe(f"document:{number}", nobody)
    assert not subscriber._waiting
    await redis.aclose()
