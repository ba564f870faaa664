"""A live document: pycrdt, with what it must not be trusted with kept outside.

The only place that hands it what others wrote, and the only one that catches its PanicException.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import structlog
from pycrdt import merge_updates

from server.documents import updates, wire
from server.errors import TooLarge, ValidationFailed

log = structlog.get_logger()

MOST_STATE_BYTES = 10 << 20  # merging and loading hold the GIL: 0.3 s for one of this size
MEASURED_AGAIN_BYTES = 256 << 10
MOST_ASIDE_BYTES = 1 << 20  # of updates that came before what they build on


@contextmanager
def guarded() -> Iterator[None]:
    """Turns whatever pycrdt raises over malformed bytes into our refusal.

    Raises:
        ValidationFailed: it has.
    """
    try:
        yield
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:
        raise ValidationFailed("The update is malformed, or does not fit the document") from error


def well_formed(update: bytes) -> bytes:
    """The update as it is stored and passed on: read to its end and written anew, without what follows it.

    Raises:
        ValidationFailed: it is malformed.
    """
    with guarded():
        return merge_updates(update)


class Live:
    """A pycrdt document, its text, and what it keeps aside."""

    def __init__(self, log_of_updates: Sequence[bytes]) -> None:
        self._doc, self._text = updates.load(())
        self._bytes = sum(map(len, log_of_updates))  # at most so many
        self._measured = False
        self._since_measured = 0
        self._aside: bytes | None = None
        self._revive(log_of_updates)

    @property
    def size(self) -> int:
        """Of the text, in bytes."""
        return len(self._text)

    @property
    def text(self) -> str:
        return str(self._text)

    def vector(self) -> bytes:
        return self._doc.get_state()

    def update(self, vector: bytes | None = None) -> bytes:
        """All that a client lacks which has this much.

        Raises:
            ValidationFailed: that is no state vector.
        """
        if vector is not None:
            try:
                wire.state_vector(vector)
            except wire.Malformed as error:
                raise ValidationFailed(f"The state vector is malformed: {error}") from None
        with guarded():
            update = self._doc.get_update(vector)
            return merge_updates(update, self._aside) if self._aside else update

    def knows(self, update: bytes) -> bool:
        """Whether a well-formed update brings nothing new."""
        with guarded():
            return updates.is_known(update, self._doc)

    def is_next(self, update: bytes) -> bool:
        """Whether a well-formed update goes on where its one client stopped, as those of an editor do."""
        known = wire.state_vector(self._doc.get_state())
        try:
            if wire.adds_nothing(update):
                return all(known.get(each.client, 0) >= each.end for each in wire.deletions(update))
            begins = wire.adds_at(update)
        except wire.Malformed:
            return False
        return begins is not None and known.get(begins[0], 0) == begins[1]

    def demand_room_for(self, update: bytes) -> None:
        """Raises TooLarge where the document would become too large."""
        if self._bytes + len(update) <= MOST_STATE_BYTES:
            return
        if not self._measured or self._since_measured >= MEASURED_AGAIN_BYTES:
            self._bytes = len(self._doc.get_update()) + len(self._aside or b"")
            self._measured, self._since_measured = True, 0
        if self._bytes + len(update) > MOST_STATE_BYTES:
            raise TooLarge(f"A document may have {MOST_STATE_BYTES} bytes with its history of edits")
        if self._aside and len(self._aside) + len(update) > MOST_ASIDE_BYTES:
            raise TooLarge("Too many updates came before what they build on")

    def apply(self, update: bytes) -> None:
        """Take a well-formed update.

        Raises:
            ValidationFailed: it does not fit, and this live document must not be used any more.
        """
        with guarded():
            self._doc.apply_update(update)
            given = merge_updates(self._aside, update) if self._aside else update
            self._aside = updates.missing(given, self._doc)
        self._bytes += len(update)
        self._since_measured += len(update)

    def _revive(self, log_of_updates: Sequence[bytes]) -> None:
        """Begin with a log. An update that pycrdt chokes on now, though it did not then, is left out."""
        # A snapshot is large and complete: merging it with what follows would only take time.
        first, rest = log_of_updates[:1], log_of_updates[1:]
        try:
            with guarded():
                parts = [*first, updates.merge(rest)] if rest else first
                for part in parts:
                    self._doc.apply_update(part)
                aside = [missing for part in parts if (missing := updates.missing(part, self._doc))]
                self._aside = updates.merge(aside) if aside else None
        except ValidationFailed:
            log.exception("a log cannot be applied at once")
        else:
            return
        self._doc, self._text = updates.load(())
        for update in log_of_updates:
            try:
                self.apply(update)
            except ValidationFailed:
                log.exception("an update of a log cannot be applied", bytes=len(update))
