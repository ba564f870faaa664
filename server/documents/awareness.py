"""Who is looking at a document, and where their cursors are: ephemeral, kept for those who come later; pure.

A client id belongs to the socket that used it first. Clocks are stamped here, because a client that comes back
begins to count where it stopped, after others were told with a higher number that it had left.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from uuid import UUID

from server import json
from server.documents.wire import Entry, Malformed
from server.errors import ServiceError

STALE_SECONDS = 40.0  # clients say it anew every 15 s; of a killed process nobody says so
RENEW_SECONDS = 15.0
MOST_SAID_BYTES = 16 << 10
MOST_CLIENTS = 1000  # in one document
GONE = "null"


@dataclass(frozen=True)
class Presence:
    entry: Entry
    owner: str  # a socket of this process, or another process
    user: UUID
    seen_at: float


class Awareness:
    """Of one document. ``now`` is the wall clock in seconds, roughly the same in all processes."""

    def __init__(self) -> None:
        self._clients: dict[int, Presence] = {}
        self._left: dict[int, int] = {}  # the clocks of those who have left

    def __iter__(self) -> Iterator[Presence]:
        return iter(self._clients.values())

    def say(self, owner: str, user: UUID, entries: Iterable[Entry], *, now: float) -> Entry | None:
        """What a socket says of itself, stamped; None where it says nothing of itself.

        Raises:
            Malformed: what it says is not JSON, or too much.
        """
        own = self._own(owner, user, entries)
        if own is None:
            return None
        check_state(own.state)
        if own.client not in self._clients and len(self._clients) >= MOST_CLIENTS:
            raise Malformed(f"Document exceeds the maximum of {MOST_CLIENTS} awareness states")
        return self._put(Presence(self._stamped(own, now), owner, user, now))

    def hear(self, entry: Entry, *, owner: str, user: UUID, now: float) -> bool:
        """What another process says of its clients; whether it is news."""
        known = self._clients.get(entry.client)
        clock = known.entry.clock if known else self._left.get(entry.client, -1)
        if entry.clock <= clock or (known is None and len(self._clients) >= MOST_CLIENTS):
            return False
        self._put(Presence(entry, owner, user, now))
        return True

    def leave(self, owner: str, *, now: float) -> list[Presence]:
        """The clients of a socket (or a process) are gone: what others must hear."""
        return self._remove((each for each in self if each.owner == owner), now)

    def prune(self, *, now: float) -> list[Presence]:
        """Those of whom nobody has spoken for too long are gone: what others must hear."""
        return self._remove((each for each in self if now - each.seen_at > STALE_SECONDS), now)

    def renew(self, owners: Iterable[str], *, now: float) -> list[Presence]:
        """Say again what these sockets said, where they have not done so themselves."""
        mine = set(owners)
        old = [each for each in self if each.owner in mine and now - each.seen_at > RENEW_SECONDS]
        renewed = [Presence(self._stamped(each.entry, now), each.owner, each.user, now) for each in old]
        for each in renewed:
            self._put(each)
        return renewed

    def _own(self, owner: str, user: UUID, entries: Iterable[Entry]) -> Entry | None:
        """The entry of the socket's own client: clients also relay what they heard of others."""
        given = list(entries)
        bound = next((each.entry.client for each in self if each.owner == owner), None)
        if bound is not None:
            return next((entry for entry in given if entry.client == bound), None)
        for entry in given:
            known = self._clients.get(entry.client)
            # A client that came back, before we noticed that its old socket is dead, takes its id along.
            if entry.state != GONE and (known is None or (known.user == user and len(given) == 1)):
                return entry
        return None

    def _stamped(self, entry: Entry, now: float) -> Entry:
        known = self._clients.get(entry.client)
        last = known.entry.clock if known else self._left.get(entry.client, 0)
        return entry._replace(clock=max(last + 1, int(now * 1000)))

    def _put(self, presence: Presence) -> Entry:
        entry = presence.entry
        if entry.state == GONE:
            self._clients.pop(entry.client, None)
            self._left[entry.client] = entry.clock
            while len(self._left) > MOST_CLIENTS:
                del self._left[next(iter(self._left))]
        else:
            self._clients[entry.client] = presence
        return entry

    def _remove(self, gone: Iterable[Presence], now: float) -> list[Presence]:
        removed = [
            Presence(self._stamped(each.entry._replace(state=GONE), now), each.owner, each.user, now) for each in gone
        ]
        for each in removed:
            self._put(each)
        return removed


def check_state(state: str) -> None:
    """Raises Malformed for what would make clients fail that read it."""
    if len(state.encode()) > MOST_SAID_BYTES:
        raise Malformed(f"Awareness state exceeds the maximum size of {MOST_SAID_BYTES >> 10} KiB")
    try:
        value = json.loads(state)
    except ServiceError:
        raise Malformed("Awareness state must be JSON") from None
    if value is not None and not isinstance(value, dict):
        raise Malformed("Awareness state must be a JSON object or null")
