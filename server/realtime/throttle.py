"""How much a peer may send: a bucket of frames, and patience with what is over it or malformed; pure."""

from collections import deque

PATIENCE_SECONDS = 10.0
MALFORMED_FRAMES = 50  # within PATIENCE_SECONDS
CALM_SECONDS = 1.0  # without a refusal, and the peer is within its limit again


class Throttle:
    """``now`` is any clock that only grows, in seconds."""

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
        """Take one frame from the bucket; False where it is empty."""
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
        """Whether patience has ended: refused for 10 s on end, or 50 malformed frames within 10 s."""
        refused = now - self._refused_at < CALM_SECONDS and now - self._over_since >= PATIENCE_SECONDS
        malformed = self._malformed is not None and len(self._malformed) == MALFORMED_FRAMES
        return refused or (malformed and self._malformed is not None and now - self._malformed[0] <= PATIENCE_SECONDS)
