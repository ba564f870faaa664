"""The blacklist: a fast lookup of ended sessions, as Redis entries with the lifetime of an access token.

The session's row in PostgreSQL is the source of truth. Redis is trusted only after it has kept entries for the lifetime
of an access token: if it was started or emptied since then, it may have lost entries that matter. Both are detectable:
an emptied Redis has lost the key that says since when it keeps entries, and a restarted or promoted one has lost its
script cache, which neither disk nor replicas keep. A failed write counts as a lost entry: all processes then read the
rows, too, until the tokens in question have expired.
"""

import asyncio
import time
from collections.abc import Iterable
from typing import Any
from uuid import UUID

from redis.asyncio import Redis
from redis.exceptions import NoScriptError, RedisError

from server.pipelines import Pipelines

ANSWER_SECONDS = 0.5  # beyond that, reading the row is faster
REST_SECONDS = 2.0  # the circuit breaker's cooldown: no request to Redis after a failure
# All keys share one hash tag, because one Lua call reads them together.
_SINCE = "{auth}:remembers-since"
_MARGIN_SECONDS = 5  # more than the leeway of expiry

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
        self._missed = False  # a write failed, so Redis may lack entries

    async def add(self, *, sessions: Iterable[UUID] = (), tokens: Iterable[str] = ()) -> None:
        """Add ended sessions and token ids. An outage of Redis raises nothing: PostgreSQL has the same facts."""
        keys = [*map(_key, sessions), *map(_key, tokens)]
        if not keys:
            return
        succeeded = False
        try:
            if not self._is_resting():
                async with asyncio.timeout(ANSWER_SECONDS), self._redis.pipeline(transaction=False) as pipeline:
                    for key in keys:
                        pipeline.set(key, b"", ex=self._seconds)
                    await pipeline.execute()
                succeeded = True
        except _AWAY:
            self._rest()
        finally:
            if not succeeded:  # also when the caller's timeout cancels this call
                self.distrust()

    def distrust(self) -> None:
        """Record that Redis may lack entries: PostgreSQL decides, in all processes once Redis can be reset."""
        self._missed = True

    async def ended(self, *, session: UUID, token: str) -> bool | None:
        """Return whether session or token is on the blacklist; None if Redis is unreachable or incomplete."""
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
        """After a failed write, make all processes read the rows. Call it periodically."""
        if self._missed and not self._is_resting():
            self._missed = False  # before the await: another write may fail during it
            await self._start_anew()

    async def _ask(self, *keys: str) -> bool | None:
        is_listed, age_seconds = await self._pipelines.ask(
            "EVALSHA", self._ask_sha, 1 + len(keys), _SINCE, *keys, seconds=ANSWER_SECONDS
        )
        if is_listed:
            return True
        return False if age_seconds > self._seconds else None

    async def _start_anew(self) -> None:
        """Restart the period in which Redis keeps entries; PostgreSQL decides until it is long enough."""
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
