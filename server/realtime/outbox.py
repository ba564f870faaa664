"""Backpressure for a slow peer: a queue of frames, bounded in frames and bytes, with three delivery classes.

Pure: no I/O.
"""

import enum
from collections.abc import Hashable, Iterator
from itertools import count


class Delivery(enum.Enum):
    DURABLE = "durable"  # delivered, or the connection closes
    NEWEST = "newest"  # replaces a pending frame with the same key
    DROPPABLE = "droppable"  # dropped when the outbox is full


class Outbox:
    """A first-in, first-out queue; a full queue drops ephemeral frames, the oldest first, for new ones."""

    def __init__(self, *, most_frames: int, most_bytes: int) -> None:
        self._most_frames = most_frames
        self._most_bytes = most_bytes
        self._waiting: dict[Hashable, bytes] = {}
        self._ephemeral: dict[Hashable, None] = {}
        self._numbers = count()
        self.bytes = 0
        self.dropped = 0  # by the last put

    def __len__(self) -> int:
        return len(self._waiting)

    def put(self, frame: bytes, delivery: Delivery, key: Hashable = None) -> bool:
        """Add a frame; return False if it is durable and the outbox is full.

        An empty outbox takes a frame of any size: acks are as large as the data that the client requested.
        """
        self.dropped = 0
        if delivery is Delivery.NEWEST:
            slot: Hashable = ("newest", key)
            self._remove(slot)
        else:
            slot = next(self._numbers)
        while not self._has_room(frame):
            if not self._ephemeral:
                self.dropped += delivery is not Delivery.DURABLE
                return delivery is not Delivery.DURABLE
            self._remove(next(iter(self._ephemeral)))
            self.dropped += 1
        self._waiting[slot] = frame
        self.bytes += len(frame)
        if delivery is not Delivery.DURABLE:
            self._ephemeral[slot] = None
        return True

    def take(self, most: int) -> Iterator[bytes]:
        """Remove and yield the oldest frames, up to ``max_bytes`` but at least one frame."""
        while self._waiting and most > 0:
            slot = next(iter(self._waiting))
            most -= len(self._waiting[slot])
            yield self._remove(slot)

    def clear(self) -> None:
        self._waiting.clear()
        self._ephemeral.clear()
        self.bytes = 0

    def _has_room(self, frame: bytes) -> bool:
        if not self._waiting:
            return True
        return len(self._waiting) < self._most_frames and self.bytes + len(frame) <= self._most_bytes

    def _remove(self, slot: Hashable) -> bytes:
        frame = self._waiting.pop(slot, b"")
        self._ephemeral.pop(slot, None)
        self.bytes -= len(frame)
        return frame
