"""Rate limit of a connection: a token bucket of frames, and limits for violations and malformed frames; pure."""

from collections import deque

PATIENCE_SECONDS = 10.0
MALFORMED_FRAMES = 50  # within ``VIOLATION_WINDOW_SECONDS``
CALM_SECONDS = 1.0  # a peer without rejected frames for this long is within its rate limit again


class Throttle:
    """A token bucket; ``now`` is any monotonic clock, in seconds."""

    __slots__ = ("_burst", "_left", "_malformed", "_over_since", "_rate", "_refilled_at", "_refused_at")

    def __init__(self, *, rate: float, burst: float, now: float) -> None:
        self._rate = rate
        self._burst = burst
        self._left = burst
        self._refilled_at = now
        self._refused_at = now - CALM_SECONDS
        self._over_since = now
        self._malformed: deque[float] | None = None  # most peers never need it

    def admit(self, now: float) -> bool:
        """Take one token from the bucket; return False if it is empty."""
        self._left = min(self._burst, self._left + (now - self._refilled_at) * self._rate)
        self._refilled_at = now
        if self._left >= 1:
            self._left -= 1
            return True
        if now - self._refused_at >= CALM_SECONDS:
            self._over_since = now
        self._refused_at = now
        return False

    def note_malformed(self, now: float) -> None:
        if self._malformed is None:
            self._malformed = deque(maxlen=MALFORMED_FRAMES)
        self._malformed.append(now)

    def exhausted(self, now: float) -> bool:
        """Whether to close the connection: over the limit for 10 s, or 50 malformed frames within 10 s."""
        over_limit = now - self._refused_at < CALM_SECONDS and now - self._over_since >= PATIENCE_SECONDS
        malformed = self._malformed is not None and len(self._malformed) == MALFORMED_FRAMES
        return over_limit or (
            malformed and self._malformed is not None and now - self._malformed[0] <= PATIENCE_SECONDS
        )
