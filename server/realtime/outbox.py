"""What waits for a slow peer: bounded in frames and bytes, in three delivery classes; pure, without I/O."""

import enum
from collections.abc import Hashable, Iterator
from itertools import count


class Delivery(enum.Enum):
    DURABLE = "durable"  # delivered, or the connection ends
    NEWEST = "newest"  # replaces the one of the same key that still waits
    DROPPABLE = "droppable"  # goes when there is no room


class Outbox:
    """First in, first out. Ephemeral frames, the oldest first, give way to durable ones."""

    def __init__(self, *, most_frames: int, most_bytes: int) -> None:
        self._most_frames = most_frames
        self._most_bytes = most_bytes
        self._waiting: dict[Hashable, bytes] = {}
        self._ephemeral: dict[Hashable, None] = {}
        self._numbers = count()
        self.bytes = 0
        self.dropped = 0  # since the last put

    def __len__(self) -> int:
        return len(self._waiting)

    def put(self, frame: bytes, delivery: Delivery, key: Hashable = None) -> bool:
        """Whether the peer still gets what it must: False where a durable frame finds no room.

        A frame larger than the whole outbox may wait in it alone: acks are as large as what was asked for.
        """
        self.dropped = 0
        if delivery is Delivery.NEWEST:
            place: Hashable = ("newest", key)
            self._remove(place)
        else:
            place = next(self._numbers)
        while not self._has_room(frame):
            if not self._ephemeral:
                self.dropped += delivery is not Delivery.DURABLE
                return delivery is not Delivery.DURABLE
            self._remove(next(iter(self._ephemeral)))
            self.dropped += 1
        self._waiting[place] = frame
        self.bytes += len(frame)
        if delivery is not Delivery.DURABLE:
            self._ephemeral[place] = None
        return True

    def take(self, most: int) -> Iterator[bytes]:
        """The oldest frames, up to so many bytes but at least one."""
        while self._waiting and most > 0:
            place = next(iter(self._waiting))
            most -= len(self._waiting[place])
            yield self._remove(place)

    def clear(self) -> None:
        self._waiting.clear()
        self._ephemeral.clear()
        self.bytes = 0

    def _has_room(self, frame: bytes) -> bool:
        if not self._waiting:
            return True
        return len(self._waiting) < self._most_frames and self.bytes + len(frame) <= self._most_bytes

    def _remove(self, place: Hashable) -> bytes:
        frame = self._waiting.pop(place, b"")
        self._ephemeral.pop(place, None)
        self.bytes -= len(frame)
        return frame
