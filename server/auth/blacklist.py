"""The quick answer to "has this session ended?": a note in Redis for as long as its access tokens live.

The session's row in PostgreSQL is the truth. Redis is trusted only when it has remembered for an access
token's lifetime: one that was started or emptied since then may have forgotten notes that matter. It cannot
hide that it was emptied (its own first note is gone) nor that it was started (its script cache is gone, which
is kept neither on disk nor by replicas). A note that could not be made is as good as forgotten: then all
processes ask the rows, too, until the tokens that it was about have expired.
"""

import asyncio
import time
from collections.abc import Iterable
from typing import Any
from uuid import UUID

from redis.asyncio import Redis
from redis.exceptions import NoScriptError, RedisError

from server.pipelines import Pipelines

ANSWER_SECONDS = 0.5  # beyond that the row is quicker
REST_SECONDS = 2.0  # how long Redis is left alone after it did not answer
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
_AWAY = (RedisError, OSError, TimeoutError)


class Blacklist:
    def __init__(self, redis: Redis, pipelines: Pipelines, *, token_ttl: int) -> None:
        self._redis: Any = redis
        self._pipelines = pipelines
        self._seconds = token_ttl + _MARGIN_SECONDS
        self._ask_sha: str = self._redis.register_script(_ASK).sha
        self._resting_until = 0.0
        self._missed = False  # a note could not be made

    async def add(self, *, sessions: Iterable[UUID] = (), tokens: Iterable[str] = ()) -> None:
        """Note that these ended. That Redis is away does not matter: the rows say so too."""
        keys = [*map(_key, sessions), *map(_key, tokens)]
        if not keys:
            return
        noted = False
        try:
            if not self._is_resting():
                async with asyncio.timeout(ANSWER_SECONDS), self._redis.pipeline(transaction=False) as pipeline:
                    for key in keys:
                        pipeline.set(key, b"", ex=self._seconds)
                    await pipeline.execute()
                noted = True
        except _AWAY:
            self._rest()
        finally:
            if not noted:  # also where whoever asked has lost patience
                self.distrust()

    def distrust(self) -> None:
        """Redis may lack notes: as soon as it can be told, the rows decide."""
        self._missed = True

    async def ended(self, *, session: UUID, token: str) -> bool | None:
        """Whether session or token is noted as ended; None when Redis cannot know."""
        if self._missed or self._is_resting():
            return None
        try:
            return await self._ask(_key(session), _key(token))
        except NoScriptError:
            await self._start_anew()
        except _AWAY:
            self._rest()
        return None

    async def catch_up(self) -> None:
        """After a missed note, tell all processes to ask the rows. To be called every now and then."""
        if self._missed and not self._is_resting():
            self._missed = False  # before the wait: another may be missed during it
            await self._start_anew()

    async def _ask(self, *keys: str) -> bool | None:
        noted, remembers = await self._pipelines.ask(
            "EVALSHA", self._ask_sha, 1 + len(keys), _SINCE, *keys, seconds=ANSWER_SECONDS
        )
        if noted:
            return True
        return False if remembers > self._seconds else None

    async def _start_anew(self) -> None:
        """From now on Redis remembers; until it has done so for long enough the rows decide."""
        try:
            async with asyncio.timeout(ANSWER_SECONDS):
                await self._redis.delete(_SINCE)
                await self._redis.script_load(_ASK)
        except _AWAY:
            self._rest()
            self.distrust()

    def _rest(self) -> None:
        self._resting_until = time.monotonic() + REST_SECONDS

    def _is_resting(self) -> bool:
        return time.monotonic() < self._resting_until


def _key(ended: UUID | str) -> str:
    return f"{{auth}}:ended:{ended}"
