"""Rate limits: the ``@limit`` mark and the check.

Counted in Redis, so they hold over all processes. While Redis is away each process counts for itself, and counts
that it did. Notation, keys, windows and the local count are the limits library's; its Redis storage is not used: it
would ask three times for what one script tells, in round trips of its own (measured with 64 at once: 180 µs of
processor time for a check, ours 40), and it rounds to seconds, down too, so that Retry-After would be too early.
"""

import asyncio
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from ipaddress import ip_network
from typing import Any, TypeVar

import limits
from limits.aio.storage import MemoryStorage
from redis.exceptions import RedisError

from server import metrics
from server.pipelines import Pipelines

H = TypeVar("H", bound=Callable[..., Any])
# So long may Redis answer nobody before the local count does. A plain timeout would let a burst of requests, which are
# answered one after the other, slip into the local count, and pass there once more.
SILENCE_SECONDS = 0.5
LONGEST_SECONDS = 1.0  # for one answer, however many others get theirs
LOCAL_SECONDS = 1.5  # how long to count locally before Redis is asked again
IPV6_PREFIX = 64
# What the library does on Redis, and the time that is left in the same breath, in milliseconds.
_COUNT = """
local count = redis.call('INCRBY', KEYS[1], ARGV[2])
if redis.call('PTTL', KEYS[1]) < 0 then redis.call('PEXPIRE', KEYS[1], ARGV[1]) end
return {count, redis.call('PTTL', KEYS[1])}
"""
BY_ADDRESS = frozenset({"auth"})  # budgets that the users of one address share, signed in or not


def limit(name: str | None) -> Callable[[H], H]:
    """Mark a handler: which budget its requests are taken from; None for none."""

    def mark(handler: H) -> H:
        handler.__limit__ = name  # type: ignore[attr-defined]
        return handler

    return mark


def limit_of(handler: Callable[..., Any]) -> str | None:
    return getattr(handler, "__limit__", "default")


def payer(name: str, *, client: str, user: object | None = None) -> str:
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
    def __init__(
        self, redis: Pipelines, *, rates: dict[str, limits.RateLimitItem | None], prefix: str = "limit"
    ) -> None:
        self.rates = rates
        self._redis = redis
        self._prefix = prefix
        self._local = MemoryStorage()
        self._local_until = 0.0

    def counts(self, name: str) -> bool:
        """Whether that limit is on."""
        return self.rates[name] is not None

    async def hit(self, name: str, who: str, *, amount: int = 1) -> Budget | None:
        """Take so many from the budget ``name`` of ``who``; None where that limit is off."""
        rate = self.rates[name]
        if rate is None:
            return None
        key = rate.key_for(name, who)
        if time.monotonic() < self._local_until:
            return await self._hit_local(name, rate, key, amount)
        try:
            count, left = await self._redis.ask(
                "EVAL",
                _COUNT,
                1,
                f"{self._prefix}:{key}",
                rate.get_expiry() * 1000,
                amount,
                seconds=LONGEST_SECONDS,
                silence=SILENCE_SECONDS,
            )
        except (RedisError, OSError, TimeoutError):
            self._local_until = time.monotonic() + LOCAL_SECONDS
            return await self._hit_local(name, rate, key, amount)
        return _budget(name, rate, count, left / 1000)

    async def move(self, budget: Budget, wrong: str, right: str) -> Budget:
        """What was taken from the wrong one is given back, and taken from the right one."""
        if wrong == right:
            return budget
        _, moved = await asyncio.gather(self.hit(budget.name, wrong, amount=-1), self.hit(budget.name, right))
        return moved or budget

    async def _hit_local(self, name: str, rate: limits.RateLimitItem, key: str, amount: int) -> Budget:
        metrics.LIMITER_FALLBACKS.inc()
        count = await self._local.incr(key, rate.get_expiry(), amount)
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
