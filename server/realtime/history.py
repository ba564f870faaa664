"""The durable events of a workspace: a Redis stream, whose ids are the event ids.

One script appends and publishes, so that the order of the stream is the order in which everybody hears.
"""

from typing import Any
from uuid import UUID

from redis.asyncio import Redis

KEPT_SECONDS = 24 * 3600

_APPEND = """
local id = redis.call('XADD', KEYS[1], 'MAXLEN', ARGV[2], '*', 'data', ARGV[4])
redis.call('XTRIM', KEYS[1], 'MINID', (tonumber(redis.call('TIME')[1]) - tonumber(ARGV[3])) * 1000)
redis.call('EXPIRE', KEYS[1], ARGV[3])
redis.call('PUBLISH', ARGV[1], ARGV[5] .. '\\n' .. id .. '\\n'
    .. '{"event":"collaboration:event","data":{"eventId":"' .. id .. '",' .. ARGV[4] .. '}')
return id
"""

_OPEN = """
local last = redis.call('XREVRANGE', KEYS[1], '+', '-', 'COUNT', 1)
if last[1] then return last[1][1] end
return redis.call('XADD', KEYS[1], '*', 'opened', '')
"""


def stream(workspace: UUID) -> str:
    return f"ws:{{{workspace}}}:events"


class History:
    def __init__(self, redis: Redis, *, most: int) -> None:
        self._redis: Any = redis
        self._most = most
        self._append = redis.register_script(_APPEND)
        self._open = redis.register_script(_OPEN)

    async def append(self, workspace: UUID, *, channel: str, origin: str, body: bytes) -> str:
        """Append and publish; ``body`` is the event's JSON object. Its id, once it is in the stream."""
        arguments: list[str | bytes | int] = [channel, self._most, KEPT_SECONDS, body[1:], origin]
        id: bytes = await self._append(keys=[stream(workspace)], args=arguments)
        return id.decode()

    async def last(self, workspace: UUID) -> str:
        """The id of the newest entry; a workspace without any gets an opening one."""
        id: bytes = await self._open(keys=[stream(workspace)])
        return id.decode()
