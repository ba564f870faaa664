"""Rate limits: the ``@limit`` mark and the check.

Counted in Redis by the limits library, so they hold over all processes (fixed window). While Redis is away
each process counts for itself, and counts that it did.
"""

import asyncio
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import limits
from limits.aio.storage import MemoryStorage, RedisStorage
from redis.exceptions import RedisError

from server import metrics

H = TypeVar("H", bound=Callable[..., Any])
LOCAL_SECONDS = 5.0  # how long to count locally before Redis is asked again


def limit(name: str | None) -> Callable[[H], H]:
    """Mark a handler: which budget its requests are taken from; None for none."""

    def mark(handler: H) -> H:
        handler.__limit__ = name  # type: ignore[attr-defined]
        return handler

    return mark


def limit_of(handler: Callable[..., Any]) -> str | None:
    return getattr(handler, "__limit__", "default")


@dataclass(frozen=True)
class Budget:
    """What is left, in the words of draft-ietf-httpapi-ratelimit-headers."""

    name: str
    quota: int
    window: int
    remaining: int
    reset: int
    passed: bool

    def headers(self) -> dict[str, str]:
        shown = {
            "RateLimit-Policy": f'"{self.name}";q={self.quota};w={self.window}',
            "RateLimit": f'"{self.name}";r={self.remaining};t={self.reset}',
        }
        return shown if self.passed else {**shown, "Retry-After": str(max(1, self.reset))}


class RateLimiter:
    def __init__(
        self, redis_pool: Any, *, rates: dict[str, limits.RateLimitItem | None], prefix: str = "limit"
    ) -> None:
        self.rates = rates
        self._shared = RedisStorage("redis://", implementation="redispy", key_prefix=prefix, connection_pool=redis_pool)
        self._local = MemoryStorage()
        self._local_until = 0.0

    async def hit(self, name: str, who: str) -> Budget | None:
        """Take one from the budget ``name`` of ``who``; None where that limit is off."""
        rate = self.rates[name]
        if rate is None:
            return None
        key = rate.key_for(name, who)
        if time.monotonic() < self._local_until:
            return await self._take(self._local, name, rate, key)
        try:
            return await self._take(self._shared, name, rate, key)
        except (RedisError, OSError, TimeoutError):
            self._local_until = time.monotonic() + LOCAL_SECONDS
            metrics.LIMITER_FALLBACKS.inc()
            return await self._take(self._local, name, rate, key)

    async def _take(
        self, storage: MemoryStorage | RedisStorage, name: str, rate: limits.RateLimitItem, key: str
    ) -> Budget:
        count, expires = await asyncio.gather(storage.incr(key, rate.get_expiry()), storage.get_expiry(key))
        left = math.ceil(expires - time.time())
        return Budget(
            name=name,
            quota=rate.amount,
            window=rate.get_expiry(),
            remaining=max(0, rate.amount - count),
            # The expiry is read beside the count: before the first hit there is none yet.
            reset=left if 0 < left <= rate.get_expiry() else rate.get_expiry(),
            passed=count <= rate.amount,
        )
