"""Backpressure for a slow peer: a queue of frames, bounded in frames and bytes, with three delivery classes.

Frames of the classes other than durable are ephemeral. Pure: no I/O.
"""

import enum
from collections.abc import Hashable, Iterator
from itertools import count


class Delivery(enum.Enum):
    DURABLE = "durable"  # delivered, or the connection closes
    COALESCED = "coalesced"  # replaces a pending frame with the same key
    DROPPABLE = "droppable"  # dropped when the outbox is full


class Outbox:
    """A first-in, first-out queue; a full queue drops ephemeral frames, the oldest first, for new ones."""

    def __init__(self, *, max_frames: int, max_bytes: int) -> None:
        self._max_frames = max_frames
        self._max_bytes = max_bytes
        self._frames: dict[Hashable, bytes] = {}
        self._ephemeral: dict[Hashable, None] = {}
        self._sequence = count()
        self.bytes = 0
        self.dropped = 0  # by the last put

    def __len__(self) -> int:
        return len(self._frames)

    def put(self, frame: bytes, delivery: Delivery, key: Hashable = None) -> bool:
        """Add a frame; return False if it is durable and the outbox is full.

        An empty outbox takes a frame of any size: acks are as large as the data that the client requested.
        """
        self.dropped = 0
        if delivery is Delivery.COALESCED:
            slot: Hashable = ("coalesced", key)
            self._remove(slot)
        else:
            slot = next(self._sequence)
        while not self._fits(frame):
            if not self._ephemeral:
                self.dropped += delivery is not Delivery.DURABLE
                return delivery is not Delivery.DURABLE
            self._remove(next(iter(self._ephemeral)))
            self.dropped += 1
        self._frames[slot] = frame
        self.bytes += len(frame)
        if delivery is not Delivery.DURABLE:
            self._ephemeral[slot] = None
        return True

    def take(self, max_bytes: int) -> Iterator[bytes]:
        """Remove and yield the oldest frames, up to ``max_bytes`` but at least one frame."""
        while self._frames and max_bytes > 0:
            slot = next(iter(self._frames))
            max_bytes -= len(self._frames[slot])
            yield self._remove(slot)

    def clear(self) -> None:
        self._frames.clear()
        self._ephemeral.clear()
        self.bytes = 0

    def _fits(self, frame: bytes) -> bool:
        if not self._frames:
            return True
        return len(self._frames) < self._max_frames and self.bytes + len(frame) <= self._max_bytes

    def _remove(self, slot: Hashable) -> bytes:
        frame = self._frames.pop(slot, b"")
        self._ephemeral.pop(slot, None)
        self.bytes -= len(frame)
        return frame
