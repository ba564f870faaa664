"""Redis for what every request asks: commands of many requests share round trips.

On connections of their own: a client's pool, its retries and its timers cost more than a small batch of commands does.
"""

import asyncio
import functools
import math
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from redis.asyncio import Connection, Redis
from redis.exceptions import ResponseError

from server.budget import within
from server.together import Send, Together

REDIS_SECONDS = 1.0


class Pipelines:
    def __init__(self, redis: Redis) -> None:
        self._pool: Any = redis.connection_pool
        self._idle: list[Connection] = []
        self._commands: Together[tuple[Any, ...], Any] = Together(self._connected)

    def ask(self, *command: Any, seconds: float = REDIS_SECONDS, silence: float = math.inf) -> "asyncio.Future[Any]":
        """The answer, as ``Together`` has it, within what a request has left. Or RedisError, OSError, TimeoutError."""
        return self._commands.ask(command, seconds=within(seconds), silence=silence)

    async def close(self) -> None:
        await self._commands.close()
        for connection in self._idle:
            await connection.disconnect()

    @asynccontextmanager
    async def _connected(self) -> AsyncIterator[Send[tuple[Any, ...], Any]]:
        connection = self._idle.pop() if self._idle else self._made()
        try:
            async with asyncio.timeout(REDIS_SECONDS):
                await self._pool.ensure_connection(connection)
            yield functools.partial(_send, connection)
        except BaseException:
            await connection.disconnect(nowait=True)
            raise
        self._idle.append(connection)

    def _made(self) -> Connection:
        made: Connection = self._pool.make_connection()
        made.socket_timeout = None  # the round trip as a whole has a deadline
        return made


async def _send(connection: Connection, commands: list[tuple[Any, ...]]) -> list[Any]:
    async with asyncio.timeout(REDIS_SECONDS):
        await connection.send_packed_command(connection.pack_commands(commands), check_health=False)
        return [await _answer(connection) for _ in commands]


async def _answer(connection: Connection) -> Any:
    try:
        return await connection.read_response()
    except ResponseError as refusal:  # of this command only
        return refusal
