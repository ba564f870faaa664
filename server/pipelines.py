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

from server.batching import Batcher, SendBatch
from server.deadline import remaining

REDIS_TIMEOUT_SECONDS = 1.0


class Pipelines:
    def __init__(self, redis: Redis) -> None:
        self._pool: Any = redis.connection_pool
        self._idle: list[Connection] = []
        self._batcher: Batcher[tuple[Any, ...], Any] = Batcher(self._acquire)

    def submit(
        self, *command: Any, timeout: float = REDIS_TIMEOUT_SECONDS, stall_timeout: float = math.inf
    ) -> "asyncio.Future[Any]":
        """Submit a command; return the future of its reply, within the deadline of the request (see ``Batcher``).

        The future may raise RedisError, OSError or TimeoutError.
        """
        return self._batcher.submit(command, timeout=remaining(timeout), stall_timeout=stall_timeout)

    async def close(self) -> None:
        await self._batcher.close()
        for connection in self._idle:
            await connection.disconnect()

    @asynccontextmanager
    async def _acquire(self) -> AsyncIterator[SendBatch[tuple[Any, ...], Any]]:
        connection = self._idle.pop() if self._idle else self._make_connection()
        try:
            async with asyncio.timeout(REDIS_TIMEOUT_SECONDS):
                await self._pool.ensure_connection(connection)
            yield functools.partial(_send_batch, connection)
        except BaseException:
            await connection.disconnect(nowait=True)
            raise
        self._idle.append(connection)

    def _make_connection(self) -> Connection:
        connection: Connection = self._pool.make_connection()
        connection.socket_timeout = None  # the whole round trip has a timeout
        return connection


async def _send_batch(connection: Connection, commands: list[tuple[Any, ...]]) -> list[Any]:
    async with asyncio.timeout(REDIS_TIMEOUT_SECONDS):
        await connection.send_packed_command(connection.pack_commands(commands), check_health=False)
        return [await _read_reply(connection) for _ in commands]


async def _read_reply(connection: Connection) -> Any:
    try:
        return await connection.read_response()
    except ResponseError as error:  # of this command only
        return error
