"""Rate limits: the ``@limit`` decorator and the check of a quota.

Hits are counted in fixed windows in Redis, so limits hold over all processes. A circuit breaker opens when Redis fails:
for a moment each process counts for itself, and a metric counts these checks.

Notation, keys, windows and the local count are those of the limits library. Its Redis storage is not used: it takes
three round trips for what one script returns, outside of the shared pipelines (measured with 64 at once: 180 µs of
processor time for a check, the script 40), and it rounds to seconds, also down, so Retry-After would be too early.
"""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from ipaddress import IPv4Network, IPv6Network, ip_address
from typing import Any, TypeVar
from uuid import UUID

import limits
from limits.aio.storage import MemoryStorage
from redis.exceptions import RedisError

from server import metrics
from server.errors import RateLimited
from server.pipelines import Pipelines
from server.settings import Network

H = TypeVar("H", bound=Callable[..., Any])
# The local count takes over if Redis sends no reply at all for this time. With a plain timeout, requests of a burst,
# whose replies come one after the other, would switch to the local count, which would allow as many hits once more.
STALL_TIMEOUT_SECONDS = 0.5
HIT_TIMEOUT_SECONDS = 1.0  # also while other requests get their replies
LOCAL_FALLBACK_SECONDS = 1.5  # of local counting, until Redis is asked again
IPV6_PREFIX = 64
# Does what the library does on Redis, and also returns the time that is left in the window, in milliseconds. A rejected
# hit is not counted: else a later refund would not free a place in the window.
_HIT_SCRIPT = """
local count = redis.call('INCR', KEYS[1])
if redis.call('PTTL', KEYS[1]) < 0 then redis.call('PEXPIRE', KEYS[1], ARGV[1]) end
local passed = count <= tonumber(ARGV[2])
if not passed then count = redis.call('DECR', KEYS[1]) end
return {passed and 1 or 0, count, redis.call('PTTL', KEYS[1])}
"""
# After the end of the window there is no count to refund to.
_REFUND_SCRIPT = """
if tonumber(redis.call('GET', KEYS[1]) or 0) > 0 then redis.call('DECR', KEYS[1]) end
"""
_REDIS_ERRORS = (RedisError, OSError, TimeoutError)
LIMITED_BY_ADDRESS = frozenset({"auth"})  # quotas that the users of one address share, signed in or not
LIMITED_BY_HANDLER = frozenset({"refresh"})  # quotas that the handler consumes: only it knows the session


def limit(name: str | None) -> Callable[[H], H]:
    """Mark a handler with the quota that its requests consume; None for none."""

    def mark(handler: H) -> H:
        handler.__limit__ = name  # type: ignore[attr-defined]
        return handler

    return mark


def limit_of(handler: Callable[..., Any]) -> str | None:
    return getattr(handler, "__limit__", "default")


def limit_key(name: str, *, client: str, user: object | None = None) -> str:
    """Return the key of the quota that a request consumes: of the user, or of the address for anonymous requests."""
    return (
        f"address:{client_subnet(client) or client}" if user is None or name in LIMITED_BY_ADDRESS else f"user:{user}"
    )


def session_key(session: UUID) -> str:
    """Return the key of the quota of one session."""
    return f"session:{session}"


def client_subnet(client: str) -> Network | None:
    """Return the network that counts as one client; None for a client without an address.

    For IPv6 it is the first 64 bits: a host that has one address of such a network has all of them.
    """
    try:
        address = ip_address(client)
    except ValueError:
        return None
    if address.version == 4:
        return IPv4Network(address)
    return IPv6Network((int(address), IPV6_PREFIX), strict=False)


@dataclass(frozen=True)
class Quota:
    """The state of a quota after a hit, in the terms of draft-ietf-httpapi-ratelimit-headers."""

    name: str
    amount: int
    window: int
    remaining: int
    reset: int
    allowed: bool

    def headers(self) -> dict[str, str]:
        return {
            "RateLimit-Policy": f'"{self.name}";q={self.amount};w={self.window}',
            "RateLimit": f'"{self.name}";r={self.remaining};t={self.reset}',
        }


class QuotaExceeded(RateLimited):
    """The quota is used up; the response describes this quota and no other."""

    def __init__(self, quota: Quota) -> None:
        super().__init__("Rate limit exceeded", retry_after=max(1, quota.reset))
        self.quota = quota


class RateLimiter:
    def __init__(
        self, redis: Pipelines, *, rates: dict[str, limits.RateLimitItem | None], prefix: str = "limit"
    ) -> None:
        self.rates = rates
        self._redis = redis
        self._prefix = prefix
        self._local = MemoryStorage()
        self._local_fallback_until = 0.0

    def is_enabled(self, name: str) -> bool:
        """Return whether the limit has a rate; ``off`` disables it."""
        return self.rates[name] is not None

    async def consume(self, name: str, key: str) -> Quota | None:
        """Consume one hit of the quota ``name`` of ``key``; return None for a limit that is off.

        Raises:
            QuotaExceeded: the quota is used up.
        """
        quota = await self.hit(name, key)
        if quota is not None and not quota.allowed:
            raise QuotaExceeded(quota)
        return quota

    async def hit(self, name: str, key: str) -> Quota | None:
        """Consume one hit as ``consume`` does, but report an exceeded quota by ``allowed``."""
        rate = self.rates[name]
        if rate is None:
            return None
        counter = rate.key_for(name, key)
        if self._is_local_fallback():
            return await self._hit_local(name, rate, counter)
        try:
            allowed, count, milliseconds_left = await self._eval(
                _HIT_SCRIPT, counter, rate.get_expiry() * 1000, rate.amount
            )
        except _REDIS_ERRORS:
            self._start_local_fallback()
            return await self._hit_local(name, rate, counter)
        return _quota(name, rate, count, milliseconds_left / 1000, allowed=bool(allowed))

    async def refund(self, name: str, key: str) -> None:
        """Undo an allowed hit. Without Redis it may stay counted until its window ends."""
        rate = self.rates[name]
        if rate is None:
            return
        counter = rate.key_for(name, key)
        if self._is_local_fallback():
            await self._local.decr(counter)
            return
        try:
            await self._eval(_REFUND_SCRIPT, counter)
        except _REDIS_ERRORS:
            self._start_local_fallback()

    async def move_hit(self, quota: Quota, wrong: str, right: str) -> Quota:
        """Refund a hit of the wrong key and consume it from the right one."""
        if wrong == right:
            return quota
        if quota.allowed:
            await self.refund(quota.name, wrong)
        return await self.hit(quota.name, right) or quota

    def _is_local_fallback(self) -> bool:
        return time.monotonic() < self._local_fallback_until

    def _start_local_fallback(self) -> None:
        self._local_fallback_until = time.monotonic() + LOCAL_FALLBACK_SECONDS

    async def _eval(self, script: str, counter: str, *arguments: int) -> Any:
        return await self._redis.submit(
            "EVAL",
            script,
            1,
            f"{self._prefix}:{counter}",
            *arguments,
            timeout=HIT_TIMEOUT_SECONDS,
            stall_timeout=STALL_TIMEOUT_SECONDS,
        )

    async def _hit_local(self, name: str, rate: limits.RateLimitItem, counter: str) -> Quota:
        metrics.LIMITER_FALLBACKS.inc()
        count = await self._local.incr(counter, rate.get_expiry())
        allowed = count <= rate.amount
        if not allowed:
            count = await self._local.decr(counter)
        seconds_left = await self._local.get_expiry(counter) - time.time()
        return _quota(name, rate, count, seconds_left, allowed=allowed)


def _quota(name: str, rate: limits.RateLimitItem, count: int, seconds_left: float, *, allowed: bool) -> Quota:
    window = rate.get_expiry()
    return Quota(
        name=name,
        amount=rate.amount,
        window=window,
        remaining=max(0, rate.amount - count),
        # The expiry is read separately from the count: before the first hit there is none yet.
        reset=math.ceil(seconds_left) if 0 < seconds_left <= window else window,
        allowed=allowed,
    )
