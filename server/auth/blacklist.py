"""The blacklist: a fast lookup of ended sessions, as Redis entries with the lifetime of an access token.

The session's row in PostgreSQL is the source of truth. Redis is trusted only after it has kept entries for the lifetime
of an access token: if it was started or emptied since then, it may have lost entries that matter. Both are detectable:
an emptied Redis has lost the key with the time since which it has kept all entries, and a restarted or promoted one has
lost its script cache, which neither disk nor replicas keep. A failed write counts as a lost entry: all processes then
also read the rows, until the tokens in question have expired.
"""

import asyncio
import time
from collections.abc import Iterable
from typing import Any
from uuid import UUID

from redis.asyncio import Redis
from redis.exceptions import NoScriptError, RedisError

from server.pipelines import Pipelines

BLACKLIST_TIMEOUT_SECONDS = 0.5  # beyond that, reading the row is faster
CIRCUIT_OPEN_SECONDS = 2.0  # the circuit breaker's cooldown: no request to Redis after a failure
# All keys share one hash tag, because one Lua call reads them together.
_SINCE_KEY = "{auth}:remembers-since"
_TTL_MARGIN_SECONDS = 5  # more than the leeway of expiry

_LOOKUP_SCRIPT = """
local since = redis.call('GET', KEYS[1])
local now = tonumber(redis.call('TIME')[1])
if not since then
    redis.call('SET', KEYS[1], now)
    since = now
end
return {redis.call('EXISTS', KEYS[2], KEYS[3]), now - tonumber(since)}
"""
_REDIS_ERRORS = (RedisError, OSError, TimeoutError)


class Blacklist:
    def __init__(self, redis: Redis, pipelines: Pipelines, *, token_ttl: int) -> None:
        self._redis: Any = redis
        self._pipelines = pipelines
        self._entry_ttl_seconds = token_ttl + _TTL_MARGIN_SECONDS
        self._lookup_sha: str = self._redis.register_script(_LOOKUP_SCRIPT).sha
        self._circuit_open_until = 0.0
        self._is_incomplete = False  # a write failed, so Redis may lack entries

    async def add(self, *, sessions: Iterable[UUID] = (), token_ids: Iterable[str] = ()) -> None:
        """Add ended sessions and token ids. An outage of Redis raises nothing: PostgreSQL has the same facts."""
        keys = [*map(_key, sessions), *map(_key, token_ids)]
        if not keys:
            return
        succeeded = False
        try:
            if not self._is_circuit_open():
                async with (
                    asyncio.timeout(BLACKLIST_TIMEOUT_SECONDS),
                    self._redis.pipeline(transaction=False) as pipeline,
                ):
                    for key in keys:
                        pipeline.set(key, b"", ex=self._entry_ttl_seconds)
                    await pipeline.execute()
                succeeded = True
        except _REDIS_ERRORS:
            self._open_circuit()
        finally:
            if not succeeded:  # also when the caller's timeout cancels this call
                self.mark_incomplete()

    def mark_incomplete(self) -> None:
        """Record that Redis may lack entries: PostgreSQL decides, in all processes once Redis responds again."""
        self._is_incomplete = True

    async def is_revoked(self, *, session: UUID, token_id: str) -> bool | None:
        """Return whether session or token is on the blacklist; None if Redis is unreachable or incomplete."""
        if self._is_incomplete or self._is_circuit_open():
            return None
        try:
            return await self._lookup(_key(session), _key(token_id))
        except NoScriptError:
            await self._reset_since()
        except _REDIS_ERRORS:
            self._open_circuit()
        return None

    async def reset_if_incomplete(self) -> None:
        """Make all processes read the rows after a failed write, once Redis responds. Call it periodically."""
        if self._is_incomplete and not self._is_circuit_open():
            self._is_incomplete = False  # before the await: another write may fail during it
            await self._reset_since()

    async def _lookup(self, *keys: str) -> bool | None:
        is_listed, age_seconds = await self._pipelines.submit(
            "EVALSHA", self._lookup_sha, 1 + len(keys), _SINCE_KEY, *keys, timeout=BLACKLIST_TIMEOUT_SECONDS
        )
        if is_listed:
            return True
        return False if age_seconds > self._entry_ttl_seconds else None

    async def _reset_since(self) -> None:
        """Restart the period in which Redis keeps entries; PostgreSQL decides until it is long enough."""
        try:
            async with asyncio.timeout(BLACKLIST_TIMEOUT_SECONDS):
                await self._redis.delete(_SINCE_KEY)
                await self._redis.script_load(_LOOKUP_SCRIPT)
        except _REDIS_ERRORS:
            self._open_circuit()
            self.mark_incomplete()

    def _open_circuit(self) -> None:
        self._circuit_open_until = time.monotonic() + CIRCUIT_OPEN_SECONDS

    def _is_circuit_open(self) -> bool:
        return time.monotonic() < self._circuit_open_until


def _key(ended: UUID | str) -> str:
    return f"{{auth}}:ended:{ended}"
