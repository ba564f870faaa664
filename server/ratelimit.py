"""Rate limits: the ``@limit`` mark and the check.

Counted in Redis by the limits library, so they hold over all processes (fixed window). While Redis is away
each process counts for itself, and counts that it did.
"""

import asyncio
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from ipaddress import ip_network
from typing import Any, TypeVar

import limits
from limits.aio.storage import MemoryStorage, RedisStorage
from redis.asyncio import Redis
from redis.exceptions import RedisError

from server import metrics

H = TypeVar("H", bound=Callable[..., Any])
LISTEN_SECONDS, LISTEN_TIMES = 0.1, 5  # so long may Redis answer nobody before the local count does
ASKING = 20  # at once, of two connections each: fewer than the pool has, which refuses whom it keeps waiting
LOCAL_SECONDS = 5.0  # how long to count locally before Redis is asked again
IPV6_PREFIX = 64
BY_ADDRESS = frozenset({"auth"})  # budgets that the users of one address share, signed in or not


def limit(name: str | None) -> Callable[[H], H]:
    """Mark a handler: which budget its requests are taken from; None for none."""

    def mark(handler: H) -> H:
        handler.__limit__ = name  # type: ignore[attr-defined]
        return handler

    return mark


def limit_of(handler: Callable[..., Any]) -> str | None:
    return getattr(handler, "__limit__", "default")


def payer(name: str, *, user: object | None, client: str) -> str:
    """Whose budget a request is taken from: the user's, or the address's where nobody signed in."""
    return f"address:{_household(client)}" if user is None or name in BY_ADDRESS else f"user:{user}"


def _household(client: str) -> str:
    """Of IPv6 the first 64 bits: whoever has one such address has all of them."""
    if ":" not in client:
        return client
    try:
        return str(ip_network((client, IPV6_PREFIX), strict=False))
    except ValueError:
        return client


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
    def __init__(self, redis: Redis, *, rates: dict[str, limits.RateLimitItem | None], prefix: str = "limit") -> None:
        self.rates = rates
        self._redis = redis
        pool: Any = redis.connection_pool  # the library's types know scalar options only
        self._shared = RedisStorage("redis://", implementation="redispy", key_prefix=prefix, connection_pool=pool)
        self._asking = asyncio.Semaphore(ASKING)
        self._answers = 0  # of Redis, to anybody
        self._local = MemoryStorage()
        self._local_until = 0.0

    async def hit(self, name: str, who: str) -> Budget | None:
        """Take one from the budget ``name`` of ``who``; None where that limit is off."""
        rate = self.rates[name]
        if rate is None:
            return None
        key = rate.key_for(name, who)
        if time.monotonic() < self._local_until:
            return await self._hit_local(name, rate, key)
        try:
            return await self._heard(asyncio.ensure_future(self._hit_shared(name, rate, key)))
        except (RedisError, OSError, TimeoutError):
            self._local_until = time.monotonic() + LOCAL_SECONDS
            metrics.LIMITER_FALLBACKS.inc()
            return await self._hit_local(name, rate, key)

    async def _hit_shared(self, name: str, rate: limits.RateLimitItem, key: str) -> Budget:
        async with self._asking:
            # Not the library's own get_expiry: that rounds to seconds, down too, and Retry-After would be too early.
            count, left = await asyncio.gather(
                self._shared.incr(key, rate.get_expiry()), self._redis.pttl(self._shared.bridge.prefixed_key(key))
            )
        return _budget(name, rate, count, left / 1000)

    async def _heard(self, answer: "asyncio.Task[Budget]") -> Budget:
        """The answer; TimeoutError where Redis is silent, to everybody.

        A crowd that waits for its turn, or a busy loop, is no silence: a plain timeout would let a burst of
        requests slip into the local count, and pass there once more.
        """
        silence = 0
        try:
            while silence < LISTEN_TIMES:
                answers = self._answers
                await asyncio.wait({answer}, timeout=LISTEN_SECONDS)
                if answer.done():
                    budget = answer.result()
                    self._answers += 1
                    return budget
                silence = silence + 1 if self._answers == answers else 0
            raise TimeoutError("Redis is silent")
        finally:
            answer.cancel()

    async def _hit_local(self, name: str, rate: limits.RateLimitItem, key: str) -> Budget:
        count = await self._local.incr(key, rate.get_expiry())
        return _budget(name, rate, count, await self._local.get_expiry(key) - time.time())


def _budget(name: str, rate: limits.RateLimitItem, count: int, left: float) -> Budget:
    window = rate.get_expiry()
    return Budget(
        name=name,
        quota=rate.amount,
        window=window,
        remaining=max(0, rate.amount - count),
        # The expiry is read beside the count: before the first hit there is none yet.
        reset=math.ceil(left) if 0 < left <= window else window,
        passed=count <= rate.amount,
    )
