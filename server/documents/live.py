"""A live document: pycrdt, with what it must not be trusted with kept outside.

The only place that hands it what others wrote, and the only one that catches its PanicException.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import structlog
from pycrdt import TransactionEvent, merge_updates

from server.documents import updates, wire
from server.errors import TooLarge, ValidationFailed

log = structlog.get_logger()

MOST_STATE_BYTES = 10 << 20  # loading holds the GIL: 0.3 s for one of this size
MEASURED_AGAIN_BYTES = 256 << 10
COMPARED_BYTES = 1 << 20  # of deletions, compared on the loop: 20 ms
NO_STATE = b"\x00"  # the state vector of who has nothing
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
        raise ValidationFailed("Update is malformed or does not fit the document") from error


def well_formed(update: bytes) -> bytes:
    """The update as it is stored and passed on: read to its end and written anew, without what follows it.

    Raises:
        ValidationFailed: it is malformed.
    """
    with guarded():
        return merge_updates(update)


def demand_vector(vector: bytes | None) -> None:
    """Raises ValidationFailed where this is no state vector."""
    try:
        wire.state_vector(vector or NO_STATE)
    except wire.Malformed as error:
        raise ValidationFailed(f"State vector is malformed: {error}") from None


class Live:
    """A pycrdt document, its text, and what it keeps aside.

    It is given only updates that it ``trusts``, and such as have been tasted on it.
    """

    def __init__(self, state: bytes = wire.NOTHING) -> None:
        self._doc, self._text = updates.load(())
        self.size = 0  # of the text, in bytes
        self._bytes = 0  # at most so many
        self._measured = False
        self._since_measured = 0
        self._aside: bytes | None = None
        self._whole: bytes | None = None  # the full update, as long as it is that
        self._deletions: bytes | None = None  # as well
        self.apply(state)

    @property
    def text(self) -> str:
        with guarded():
            return str(self._text)

    def vector(self) -> bytes:
        return self._doc.get_state()

    def update(self, vector: bytes | None = None) -> bytes:
        """All that a client lacks which has this much.

        Raises:
            ValidationFailed: that is no state vector.
        """
        demand_vector(vector)
        if vector is None or vector == NO_STATE:
            if self._whole is None:
                self._whole = self._difference(None)
            return self._whole
        return self._difference(vector)

    def _difference(self, vector: bytes | None) -> bytes:
        with guarded():
            update = self._doc.get_update(vector)
            return merge_updates(update, self._aside) if self._aside else update

    def trusts(self, update: bytes) -> bool:
        """Whether an update can only do what it seems to: typing that goes on where its client stopped.

        Others may contradict what is there, and crash pycrdt. These have not been seen to, however wrong the places
        are which they name, as long as nothing waits for them to come.
        """
        typed = wire.typing(update)
        if typed is None or self._aside is not None:
            return False
        known = wire.state_vector(self._doc.get_state())
        if typed.client is not None and known.get(typed.client, 0) != typed.start:
            return False
        return all(known.get(client, 0) >= until for client, until in typed.builds_on)

    def has_deleted(self, update: bytes) -> bool:
        """Whether an update only deletes what is deleted already: clients that come back say it all again."""
        if not wire.adds_nothing(update) or len(update) > COMPARED_BYTES:
            return False
        with guarded():
            if self._deletions is None:
                self._deletions = updates.deletions(self._doc)
            return updates.has_deleted(update, self._deletions)

    def demand_room_for(self, update: bytes) -> None:
        """Raises TooLarge where the document would become too large."""
        if self._aside and len(self._aside) + len(update) > MOST_ASIDE_BYTES:
            raise TooLarge(f"Updates without their predecessors exceed the maximum of {MOST_ASIDE_BYTES >> 20} MiB")
        if self._bytes + len(update) <= MOST_STATE_BYTES or wire.adds_nothing(update):
            return  # what is full can be made smaller
        if not self._measured or self._since_measured >= MEASURED_AGAIN_BYTES:
            self._bytes = len(self.update())
            self._measured, self._since_measured = True, 0
        if self._bytes + len(update) > MOST_STATE_BYTES:
            raise TooLarge(f"Document with its edit history exceeds the maximum size of {MOST_STATE_BYTES >> 20} MiB")

    def apply(self, update: bytes) -> bool:
        """Take a well-formed update; whether it brings anything new.

        Raises:
            ValidationFailed: it does not fit, and this live document must not be used any more.
        """
        with guarded():
            is_new = self._put(update)
            given = merge_updates(self._aside, update) if self._aside else update
            aside = updates.missing(given, self._doc)
            self.size = len(self._text)
        if not is_new and aside == self._aside:
            return False
        self._aside = aside
        self._whole = self._deletions = None
        self._bytes += len(update)
        self._since_measured += len(update)
        return True

    def _put(self, update: bytes) -> bool:
        """Whether it did anything; of deletions, which clients like to repeat, it is not known before."""
        if not wire.adds_nothing(update):
            self._doc.apply_update(update)
            return True
        heard: list[TransactionEvent] = []
        subscription = self._doc.observe(heard.append)
        try:
            self._doc.apply_update(update)
        finally:
            self._doc.unobserve(subscription)  # else it is never freed
        return bool(heard)
