"""Redis for what every request asks: commands of many requests share round trips.

A round trip by itself costs redis-py more processor time than PostgreSQL's answer does; so what is asked for in one
turn of the loop, or while other round trips are under way, goes together.
"""

import asyncio
from contextvars import Context
from typing import Any

from redis.asyncio import Redis
from redis.exceptions import BusyLoadingError, RedisError

ROUND_TRIPS = 4  # at once, of one connection each
TOGETHER = 128  # commands in a round trip
MOST_WAITING = 8192


class Pipelines:
    def __init__(self, redis: Redis) -> None:
        self._redis: Any = redis
        self._waiting: list[tuple[tuple[Any, ...], asyncio.Future[Any]]] = []
        self._under_way: set[asyncio.Task[None]] = set()
        self._starting = False

    def ask(self, *command: Any) -> "asyncio.Future[Any]":
        """The answer to one command, to be awaited with a deadline. It raises RedisError or OSError."""
        loop = asyncio.get_running_loop()
        answer: asyncio.Future[Any] = loop.create_future()
        if len(self._waiting) >= MOST_WAITING:
            answer.set_exception(BusyLoadingError("Too many commands wait for Redis"))
            return answer
        self._waiting.append((command, answer))
        if not self._starting:
            self._starting = True
            loop.call_soon(self._start)
        return answer

    async def close(self) -> None:
        for task in self._under_way:
            task.cancel()
        await asyncio.gather(*self._under_way, return_exceptions=True)

    def _start(self) -> None:
        self._starting = False
        # Who gave up in the meantime is not asked for any more.
        self._waiting = [(command, answer) for command, answer in self._waiting if not answer.done()]
        while self._waiting and len(self._under_way) < ROUND_TRIPS:
            batch, self._waiting = self._waiting[:TOGETHER], self._waiting[TOGETHER:]
            # Without the context of whoever asked first: the others would wait under that one's budget.
            task = asyncio.get_running_loop().create_task(self._send(batch), context=Context())
            self._under_way.add(task)
            task.add_done_callback(self._ended)

    def _ended(self, task: "asyncio.Task[None]") -> None:
        self._under_way.discard(task)
        if not task.cancelled():
            self._start()

    async def _send(self, batch: list[tuple[tuple[Any, ...], "asyncio.Future[Any]"]]) -> None:
        try:
            answers = await self._answers([command for command, _ in batch])
        except (RedisError, OSError, TimeoutError) as error:
            answers = [error] * len(batch)
        except BaseException:
            for _, answer in batch:
                answer.cancel()
            raise
        for (_, answer), found in zip(batch, answers, strict=True):
            if answer.done():
                continue
            if isinstance(found, BaseException):
                answer.set_exception(found)
            else:
                answer.set_result(found)

    async def _answers(self, commands: list[tuple[Any, ...]]) -> list[Any]:
        async with self._redis.pipeline(transaction=False) as pipeline:
            for command in commands:
                pipeline.execute_command(*command)
            answers: list[Any] = await pipeline.execute(raise_on_error=False)
            return answers
