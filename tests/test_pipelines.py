"""Commands of many requests share round trips, and each gets its own reply."""

import asyncio
from contextlib import nullcontext

import pytest
from redis.exceptions import RedisError, ResponseError

from server.batching import MAX_BATCH, MAX_PENDING, Batcher
from server.deadline import store_deadline
from server.devstack.stack import Stack
from server.pipelines import Pipelines
from server.resources import redis_client
from tests.faults import FaultyNetwork, Mode


async def test_each_command_gets_its_own_reply_or_error(stack: Stack) -> None:
    redis = redis_client(stack.valkey.url)
    pipelines = Pipelines(redis)
    try:
        replies = [pipelines.submit("ECHO", str(number)) for number in range(3 * MAX_BATCH)]
        failing = pipelines.submit("EVALSHA", "0" * 40, 0)
        replies.append(pipelines.submit("ECHO", "after"))
        assert await asyncio.gather(*replies) == [*(str(n).encode() for n in range(3 * MAX_BATCH)), b"after"]
        with pytest.raises(ResponseError):
            await failing
    finally:
        await pipelines.close()
        await redis.aclose()


async def test_cancelled_command_is_not_sent_and_does_not_affect_others(stack: Stack) -> None:
    redis = redis_client(stack.valkey.url)
    pipelines = Pipelines(redis)
    try:
        await redis.delete("given-up")
        cancelled, other = pipelines.submit("INCR", "given-up"), pipelines.submit("ECHO", "x")
        cancelled.cancel()
        assert await other == b"x"
        assert await redis.get("given-up") is None
    finally:
        await pipelines.close()
        await redis.aclose()


async def test_deadline_of_one_request_does_not_apply_to_others_in_its_batch(stack: Stack) -> None:
    async with FaultyNetwork.start({"redis": stack.valkey.url}) as network:
        redis = redis_client(network.urls["redis"])
        pipelines = Pipelines(redis)
        assert await pipelines.submit("ECHO", "connected") == b"connected"
        await network.stores["redis"].set_mode(Mode.SLOW)
        with store_deadline(0.1):
            first = pipelines.submit("ECHO", "first")
        other = pipelines.submit("ECHO", "other")
        with pytest.raises(TimeoutError):
            await first
        assert await other == b"other"
        await pipelines.close()
        await redis.aclose()


async def test_all_commands_fail_while_redis_is_unavailable(unused_tcp_port: int) -> None:
    redis = redis_client(f"redis://127.0.0.1:{unused_tcp_port}")
    pipelines = Pipelines(redis)
    outcomes = await asyncio.gather(*(pipelines.submit("ECHO", "x") for _ in range(300)), return_exceptions=True)
    assert all(isinstance(outcome, RedisError | OSError) for outcome in outcomes)
    await pipelines.close()
    await redis.aclose()


async def test_stalled_request_times_out_but_a_queue_that_moves_does_not() -> None:
    slow, mute = asyncio.Event(), asyncio.Event()

    async def send(requests: list[str]) -> list[str]:
        await (mute if "mute" in requests else slow).wait()
        return requests

    batcher: Batcher[str, str] = Batcher(lambda: nullcontext(send))
    stalled = batcher.submit("mute", timeout=10, stall_timeout=0.2)
    with pytest.raises(TimeoutError):
        await stalled
    late = batcher.submit("mute", timeout=0.5)
    await asyncio.sleep(0.01)
    waiting = batcher.submit("slow", timeout=10, stall_timeout=0.4)
    for _ in range(8):  # other requests get results all the time
        slow.set()
        await batcher.submit("other", timeout=10, stall_timeout=0.4)
        await asyncio.sleep(0.1)
    assert await waiting == "slow"
    with pytest.raises(TimeoutError):
        await late
    await batcher.close()
    pending = batcher.submit("mute", timeout=10)
    await batcher.close()
    assert pending.cancelled()


async def test_request_beyond_the_queue_limit_fails_at_once() -> None:
    async def send(requests: list[int]) -> list[int]:
        return requests

    batcher: Batcher[int, int] = Batcher(lambda: nullcontext(send))
    futures = [batcher.submit(number, timeout=600) for number in range(MAX_PENDING + 1)]
    with pytest.raises(TimeoutError):
        await futures.pop()
    assert await asyncio.gather(*futures) == list(range(MAX_PENDING))
    await batcher.close()
