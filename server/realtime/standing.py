"""Whether the peers of this process may still be here, and do what they do.

Other processes say at once what has changed (``Channels.revoke_sessions``, ``access_changed``, ``gone``), on a channel
that is always heard; what they say is looked up in PostgreSQL before it counts, so that it does not matter in
which order two changes are heard. Everybody is looked up every RECHECK_SECONDS, and after Redis was away, before
anything else is delivered.
"""

import asyncio
from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any
from uuid import UUID

import structlog

from server import json
from server.errors import ServiceError
from server.realtime.peers import Revocation, Thing

if TYPE_CHECKING:
    from server.realtime.connection import Connection

log = structlog.get_logger()

RECHECK_SECONDS = 15.0
RETRY_SECONDS = 0.5
LOOKED_UP_AT_ONCE = 1000  # sessions and things in one query
Asked = tuple[UUID, Thing]
Recheck = Callable[[Sequence[UUID], Sequence[Asked]], Awaitable[tuple[set[UUID], Mapping[Asked, Any]]]]
"""Of these sessions those that live; of these (user, thing) those with access. Raises ServiceError."""
REMOVED = Revocation("removed")


class Standing:
    def __init__(self, peers: Mapping[str, "Connection"], recheck: Recheck) -> None:
        self._peers = peers
        self._recheck = recheck
        self._doubted: set[Connection] = set()
        self._reasons: dict[tuple[Connection, Thing], Revocation] = {}
        """Why somebody may have lost something, until it is known whether they have."""
        self._doubt = asyncio.Event()
        self._one_at_a_time = asyncio.Lock()
        self.notices = 0
        """Grows with every notice. Who asked PostgreSQL before one and acts on it after must ``doubt``."""

    def doubt(self, peer: "Connection") -> None:
        """Look this peer up, now."""
        self._doubted.add(peer)
        self._doubt.set()

    async def run(self) -> None:
        """Look up whoever is in doubt, and everybody every RECHECK_SECONDS."""
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._settle_doubts())
            tasks.create_task(self._recheck_all())

    async def vouch(self) -> None:
        """Returns when everybody has been looked up; who is about to enter something, when they have entered."""
        self.notices += 1
        await self._look_up_all(list(self._peers.values()))

    def deliver(self, _origin: str, _kind: str, payload: bytes) -> None:
        self.notices += 1
        notice: dict[str, Any] = json.loads(payload)
        sessions, users = _ids(notice, "sessions"), _ids(notice, "users")
        project = _id(notice, "project")
        why = Revocation(notice["reason"], notice["actor"], notice["name"]) if "reason" in notice else None
        things = {Thing(notice["kind"], id) for id in _ids(notice, "ids")}
        for peer in list(self._peers.values()):
            if peer.user.session in sessions:
                peer.close(4401, "the session has ended")
            elif things:
                for thing in things & peer.grants.keys():
                    peer.lose(thing, why or REMOVED)
            elif peer.user.id in users:
                self._distrust(peer, project, why)

    def _distrust(self, peer: "Connection", project: UUID | None, why: Revocation | None) -> None:
        for thing, access in peer.grants.items():
            if access is None or access.project == project:
                peer.grants[thing] = None
                self.doubt(peer)
                if why is not None:
                    self._reasons.setdefault((peer, thing), why)

    def interrupt(self) -> None:
        """Notices may be missed; ``vouch`` makes up for it."""

    async def resume(self) -> None:
        """Nothing to do: ``vouch`` has been called."""

    async def _settle_doubts(self) -> None:
        while True:
            await self._doubt.wait()
            self._doubt.clear()
            async with self._one_at_a_time:  # what is asked already may be older than these doubts
                doubted, self._doubted = self._doubted, set()
            # Nothing else of theirs: if that has been lost too, the notice that says why is on its way.
            await self._look_up_all(doubted, only_doubted=True)

    async def _recheck_all(self) -> None:
        while True:
            await asyncio.sleep(RECHECK_SECONDS)
            await self.vouch()

    async def _look_up_all(self, whom: Iterable["Connection"], *, only_doubted: bool = False) -> None:
        for some in _slices(whom):
            async with self._one_at_a_time:
                await self._look_up_until_answered(some, only_doubted=only_doubted)
            await asyncio.sleep(0)

    async def _look_up_until_answered(self, whom: Sequence["Connection"], *, only_doubted: bool) -> None:
        while True:
            try:
                return await self._look_up(whom, only_doubted=only_doubted)
            except ServiceError as error:
                log.warning("access cannot be looked up", error=error.detail, sockets=len(whom))
            except Exception:  # a door of its own: who is not looked up keeps what they have lost
                log.exception("access cannot be looked up", sockets=len(whom))
            await asyncio.sleep(RETRY_SECONDS)

    async def _look_up(self, whom: Sequence["Connection"], *, only_doubted: bool) -> None:
        sessions = {peer: peer.user.session for peer in whom if peer.id in self._peers}
        if not sessions:
            return
        asked = [
            (peer, thing, access)
            for peer in sessions
            for thing, access in peer.grants.items()
            if access is None or not only_doubted
        ]
        alive, found = await self._recheck(
            list(set(sessions.values())), list({(peer.user.id, thing) for peer, thing, _ in asked})
        )
        for peer, session in sessions.items():
            if session not in alive and peer.user.session == session:
                peer.close(4401, "the session has ended")
        for peer, thing, access in asked:
            # Doubted again, or decided anew meanwhile: what was just read is older than that.
            if peer not in self._doubted and thing in peer.grants and peer.grants[thing] is access:
                self._decide(peer, thing, found.get((peer.user.id, thing)))
        self._reasons = {key: why for key, why in self._reasons.items() if key[1] in key[0].grants}

    def _decide(self, peer: "Connection", thing: Thing, access: Any) -> None:
        why = self._reasons.pop((peer, thing), REMOVED)
        if access is None:
            peer.lose(thing, why)
        else:
            peer.grants[thing] = access


def _slices(whom: Iterable["Connection"]) -> Iterator[list["Connection"]]:
    some: list[Connection] = []
    questions = 0
    for peer in whom:
        some.append(peer)
        questions += 1 + len(peer.grants)
        if questions >= LOOKED_UP_AT_ONCE:
            yield some
            some, questions = [], 0
    yield some


def _ids(notice: dict[str, Any], name: str) -> set[UUID]:
    return {UUID(id) for id in notice.get(name, ())}


def _id(notice: dict[str, Any], name: str) -> UUID | None:
    return UUID(notice[name]) if name in notice else None
