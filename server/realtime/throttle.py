"""Rate limit of a connection: a token bucket of frames, and limits for violations and malformed frames; pure."""

from collections import deque

VIOLATION_WINDOW_SECONDS = 10.0
MAX_MALFORMED_FRAMES = 50  # within ``VIOLATION_WINDOW_SECONDS``
RECOVERY_SECONDS = 1.0  # a peer without rejected frames for this long is within its rate limit again


class Throttle:
    """A token bucket; ``now`` is any monotonic clock, in seconds."""

    __slots__ = ("_burst", "_malformed", "_over_limit_since", "_rate", "_refilled_at", "_rejected_at", "_tokens")

    def __init__(self, *, rate: float, burst: float, now: float) -> None:
        self._rate = rate
        self._burst = burst
        self._tokens = burst
        self._refilled_at = now
        self._rejected_at = now - RECOVERY_SECONDS
        self._over_limit_since = now
        self._malformed: deque[float] | None = None  # created at the first malformed frame: most peers send none

    def allow(self, now: float) -> bool:
        """Take one token from the bucket; return False if it is empty."""
        self._tokens = min(self._burst, self._tokens + (now - self._refilled_at) * self._rate)
        self._refilled_at = now
        if self._tokens >= 1:
            self._tokens -= 1
            return True
        if now - self._rejected_at >= RECOVERY_SECONDS:
            self._over_limit_since = now
        self._rejected_at = now
        return False

    def record_malformed(self, now: float) -> None:
        if self._malformed is None:
            self._malformed = deque(maxlen=MAX_MALFORMED_FRAMES)
        self._malformed.append(now)

    def must_close(self, now: float) -> bool:
        """Return whether to close the connection.

        It has been over its rate limit for ``VIOLATION_WINDOW_SECONDS``, or has sent ``MAX_MALFORMED_FRAMES`` in them.
        """
        over_limit = (
            now - self._rejected_at < RECOVERY_SECONDS and now - self._over_limit_since >= VIOLATION_WINDOW_SECONDS
        )
        malformed = self._malformed is not None and len(self._malformed) == MAX_MALFORMED_FRAMES
        return over_limit or (
            malformed and self._malformed is not None and now - self._malformed[0] <= VIOLATION_WINDOW_SECONDS
        )
