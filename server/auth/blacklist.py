"""The quick answer to "has this session ended?": a note in Redis for as long as its access tokens live.

The session's row in PostgreSQL is the truth. Redis is trusted only when it has remembered for an access
token's lifetime: one that was started or emptied since then may have forgotten notes that matter. It cannot
hide that it was emptied (its own first note is gone) nor that it was started (its script cache is gone, which
is kept neither on disk nor by replicas).
"""

from collections.abc import Iterable
from typing import Any
from uuid import UUID

from redis.asyncio import Redis
from redis.exceptions import NoScriptError, RedisError

# One hash tag: one Lua call asks for all of them.
_SINCE = "{auth}:remembers-since"
_MARGIN_SECONDS = 5  # the leeway of expiry, and then some

_ASK = """
local since = redis.call('GET', KEYS[1])
local now = tonumber(redis.call('TIME')[1])
if not since then
    redis.call('SET', KEYS[1], now)
    since = now
end
return {redis.call('EXISTS', KEYS[2], KEYS[3]), now - tonumber(since)}
"""


class Blacklist:
    def __init__(self, redis: Redis, *, token_ttl: int) -> None:
        self._redis: Any = redis
        self._seconds = token_ttl + _MARGIN_SECONDS
        self._script: str | None = None

    async def add(self, *, sessions: Iterable[UUID] = (), tokens: Iterable[str] = ()) -> None:
        """Note that these ended. That Redis is away does not matter: the rows say so too."""
        keys = [*map(_key, sessions), *map(_key, tokens)]
        try:
            async with self._redis.pipeline(transaction=False) as pipeline:
                for key in keys:
                    pipeline.set(key, b"", ex=self._seconds)
                if keys:
                    await pipeline.execute()
        except (RedisError, OSError):
            return

    async def ended(self, *, session: UUID, token: str) -> bool | None:
        """Whether session or token is noted as ended; None when Redis cannot know."""
        try:
            return await self._ask(_key(session), _key(token))
        except NoScriptError:
            await self._start_anew()
            return None
        except (RedisError, OSError):
            return None

    async def _ask(self, *keys: str) -> bool | None:
        if self._script is None:
            self._script = self._redis.register_script(_ASK).sha
        noted, remembers = await self._redis.evalsha(self._script, 1 + len(keys), _SINCE, *keys)
        if noted:
            return True
        return False if remembers > self._seconds else None

    async def _start_anew(self) -> None:
        """Redis was started: from now on it remembers; until then the rows decide."""
        try:
            await self._redis.delete(_SINCE)
            await self._redis.script_load(_ASK)
        except (RedisError, OSError):
            return


def _key(ended: UUID | str) -> str:
    return f"{{auth}}:ended:{ended}"
