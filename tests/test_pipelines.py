"""Commands of many requests share round trips, and each gets its own answer."""

import asyncio
from contextlib import nullcontext

import pytest
from redis.exceptions import RedisError, ResponseError

from server.budget import budget
from server.devstack.stack import Stack
from server.pipelines import Pipelines
from server.resources import redis_client
from server.together import MOST_WAITING, TOGETHER, Together
from tests.faults import Mode, Network


async def test_each_gets_its_own_answer_and_a_mistake_is_nobody_elses(stack: Stack) -> None:
    redis = redis_client(stack.valkey.url)
    pipelines = Pipelines(redis)
    try:
        many = [pipelines.ask("ECHO", str(number)) for number in range(3 * TOGETHER)]
        mistake = pipelines.ask("EVALSHA", "0" * 40, 0)
        many.append(pipelines.ask("ECHO", "after"))
        assert await asyncio.gather(*many) == [*(str(n).encode() for n in range(3 * TOGETHER)), b"after"]
        with pytest.raises(ResponseError):
            await mistake
    finally:
        await pipelines.close()
        await redis.aclose()


async def test_who_gives_up_is_not_asked_for_and_hurts_nobody(stack: Stack) -> None:
    redis = redis_client(stack.valkey.url)
    pipelines = Pipelines(redis)
    try:
        await redis.delete("given-up")
        one, other = pipelines.ask("INCR", "given-up"), pipelines.ask("ECHO", "x")
        one.cancel()
        assert await other == b"x"
        assert await redis.get("given-up") is None
    finally:
        await pipelines.close()
        await redis.aclose()


async def test_one_requests_budget_is_not_that_of_the_others_in_its_round_trip(stack: Stack) -> None:
    async with Network.to({"redis": stack.valkey.url}) as network:
        redis = redis_client(network.urls["redis"])
        pipelines = Pipelines(redis)
        assert await pipelines.ask("ECHO", "connected") == b"connected"
        await network.stores["redis"].turn(Mode.SLOW)
        with budget(0.1):
            first = pipelines.ask("ECHO", "first")
        other = pipelines.ask("ECHO", "other")
        with pytest.raises(TimeoutError):
            await first
        assert await other == b"other"
        await pipelines.close()
        await redis.aclose()


async def test_without_redis_all_are_told(unused_tcp_port: int) -> None:
    redis = redis_client(f"redis://127.0.0.1:{unused_tcp_port}")
    pipelines = Pipelines(redis)
    answers = await asyncio.gather(*(pipelines.ask("ECHO", "x") for _ in range(300)), return_exceptions=True)
    assert all(isinstance(answer, RedisError | OSError) for answer in answers)
    await pipelines.close()
    await redis.aclose()


async def test_who_hears_nothing_for_long_is_told_and_a_crowd_that_is_served_is_not() -> None:
    slow, mute = asyncio.Event(), asyncio.Event()

    async def send(questions: list[str]) -> list[str]:
        await (mute if "mute" in questions else slow).wait()
        return questions

    together: Together[str, str] = Together(lambda: nullcontext(send))
    silent = together.ask("mute", seconds=10, silence=0.2)
    with pytest.raises(TimeoutError):
        await silent
    late = together.ask("mute", seconds=0.5)
    await asyncio.sleep(0.01)
    patient = together.ask("slow", seconds=10, silence=0.4)
    for _ in range(8):  # others are answered all the time
        slow.set()
        await together.ask("other", seconds=10, silence=0.4)
        await asyncio.sleep(0.1)
    assert await patient == "slow"
    with pytest.raises(TimeoutError):
        await late
    await together.close()
    left = together.ask("mute", seconds=10)
    await together.close()
    assert left.cancelled()


async def test_more_than_can_wait_are_told_at_once() -> None:
    async def send(questions: list[int]) -> list[int]:
        return questions

    together: Together[int, int] = Together(lambda: nullcontext(send))
    answers = [together.ask(number, seconds=600) for number in range(MOST_WAITING + 1)]
    with pytest.raises(TimeoutError):
        await answers.pop()
    assert await asyncio.gather(*answers) == list(range(MOST_WAITING))
    await together.close()
