"""Redis for what every request asks: commands of many requests share round trips."""

import asyncio
import math
from typing import Any

from redis.asyncio import Redis

from server.budget import within
from server.together import Together

REDIS_SECONDS = 1.0


class Pipelines:
    def __init__(self, redis: Redis) -> None:
        self._redis: Any = redis
        self._commands: Together[tuple[Any, ...], Any] = Together(self._send)

    def ask(self, *command: Any, seconds: float = REDIS_SECONDS, silence: float = math.inf) -> "asyncio.Future[Any]":
        """The answer, as ``Together`` has it, within what a request has left. Or RedisError, OSError, TimeoutError."""
        return self._commands.ask(command, seconds=within(seconds), silence=silence)

    async def close(self) -> None:
        await self._commands.close()

    async def _send(self, commands: list[tuple[Any, ...]]) -> list[Any]:
        async with self._redis.pipeline(transaction=False) as pipeline:
            for command in commands:
                pipeline.execute_command(*command)
            answers: list[Any] = await pipeline.execute(raise_on_error=False)
            return answers
