"""Redis commands that every request sends: a pipeline batches the commands of many requests into shared round trips.

Pipelines have their own connections, because the pool, retries and timers of a client cost more than a small batch.
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
        """Submit a command; return the future of its reply, within the deadline of the request (see ``Batcher``).

        The future may raise RedisError, OSError or TimeoutError.
        """
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
        connection: Connection = self._pool.make_connection()
        connection.socket_timeout = None  # the whole round trip has a timeout
        return connection


async def _send(connection: Connection, commands: list[tuple[Any, ...]]) -> list[Any]:
    async with asyncio.timeout(REDIS_SECONDS):
        await connection.send_packed_command(connection.pack_commands(commands), check_health=False)
        return [await _answer(connection) for _ in commands]


async def _answer(connection: Connection) -> Any:
    try:
        return await connection.read_response()
    except ResponseError as error:  # of this command only
        return error
