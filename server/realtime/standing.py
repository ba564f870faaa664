"""Monitoring of sessions and access: closes or evicts the connections of this process that lost them.

Other processes publish each change at once (``Channels.revoke_sessions``, ``access_changed``, ``deleted``) on a
control channel that every process subscribes to. A changed role is rechecked in PostgreSQL before it takes effect, so
that the order of two notices does not matter. All connections are rechecked every ``RECHECK_INTERVAL_SECONDS``, and
after a Redis outage before any other message is delivered.
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
LOOKED_UP_AT_ONCE = 1000  # sessions and resources per query
Asked = tuple[UUID, Thing]
Recheck = Callable[[Sequence[UUID], Sequence[Asked]], Awaitable[tuple[set[UUID], Mapping[Asked, Any]]]]
"""Return the active sessions of these, and the access of each (user, resource) that has any. Raises ServiceError."""
REMOVED = Revocation("removed")


class Standing:
    def __init__(self, connections: Mapping[str, "Connection"], recheck: Recheck) -> None:
        self._peers = connections
        self._recheck = recheck
        self._doubted: set[Connection] = set()
        self._reasons: dict[tuple[Connection, Thing], Revocation] = {}
        """The reason of each possible loss of access, until the recheck decides it."""
        self._doubt = asyncio.Event()
        self._one_at_a_time = asyncio.Lock()
        self.notices = 0
        """Grows with every notice. Code that read access before a notice and uses it after must ``mark_stale``."""

    def doubt(self, connection: "Connection") -> None:
        """Schedule an immediate recheck of this connection."""
        self._doubted.add(connection)
        self._doubt.set()

    async def run(self) -> None:
        """Recheck stale connections at once, and all connections every ``RECHECK_INTERVAL_SECONDS``."""
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._settle_doubts())
            tasks.create_task(self._recheck_all())

    async def vouch(self) -> None:
        """Recheck all connections; pending joins are rechecked when they finish, because the epoch has grown."""
        self.notices += 1
        await self._look_up_all(list(self._peers.values()))

    def deliver(self, _origin: str, _kind: str, payload: bytes) -> None:
        self.notices += 1
        notice: dict[str, Any] = json.loads(payload)
        sessions, users = _ids(notice, "sessions"), _ids(notice, "users")
        project = _id(notice, "project")
        revocation = Revocation(notice["reason"], notice["actor"], notice["name"]) if "reason" in notice else None
        resources = {Thing(notice["kind"], id) for id in _ids(notice, "ids")}
        for connection in list(self._peers.values()):
            if connection.user.session in sessions:
                connection.close(4401, "session ended")
            elif resources:
                for resource in resources & connection.grants.keys():
                    connection.lose(resource, revocation or REMOVED)
            elif connection.user.id in users:
                self._distrust(connection, project, revocation)

    def _distrust(self, connection: "Connection", project: UUID | None, revocation: Revocation | None) -> None:
        for resource, access in connection.grants.items():
            if access is None or access.project == project:
                connection.grants[resource] = None
                self.doubt(connection)
                if revocation is not None:
                    self._reasons.setdefault((connection, resource), revocation)

    def interrupt(self) -> None:
        """Do nothing: ``recheck_all`` makes up for missed notices."""

    async def resume(self) -> None:
        """Do nothing: ``recheck_all`` has been called."""

    async def _settle_doubts(self) -> None:
        while True:
            await self._doubt.wait()
            self._doubt.clear()
            async with self._one_at_a_time:  # a query that is already running may be older than these notices
                stale, self._doubted = self._doubted, set()
            # Only their stale grants: if another one is lost too, the notice with its reason is on its way.
            await self._look_up_all(stale, only_doubted=True)

    async def _recheck_all(self) -> None:
        while True:
            await asyncio.sleep(RECHECK_SECONDS)
            await self.vouch()

    async def _look_up_all(self, connections: Iterable["Connection"], *, only_doubted: bool = False) -> None:
        for batch in _slices(connections):
            async with self._one_at_a_time:
                await self._look_up_until_answered(batch, only_doubted=only_doubted)
            await asyncio.sleep(0)

    async def _look_up_until_answered(self, connections: Sequence["Connection"], *, only_doubted: bool) -> None:
        while True:
            try:
                return await self._look_up(connections, only_doubted=only_doubted)
            except ServiceError as error:
                log.warning("access cannot be looked up", error=error.detail, sockets=len(connections))
            except Exception:  # a transport of its own: a connection that is not rechecked would keep lost access
                log.exception("access cannot be looked up", sockets=len(connections))
            await asyncio.sleep(RETRY_SECONDS)

    async def _look_up(self, connections: Sequence["Connection"], *, only_doubted: bool) -> None:
        sessions = {connection: connection.user.session for connection in connections if connection.id in self._peers}
        if not sessions:
            return
        queries = [
            (connection, resource, access)
            for connection in sessions
            for resource, access in connection.grants.items()
            if access is None or not only_doubted
        ]
        active, granted = await self._recheck(
            list(set(sessions.values())), list({(connection.user.id, resource) for connection, resource, _ in queries})
        )
        for connection, session in sessions.items():
            if session not in active and connection.user.session == session:
                connection.close(4401, "session ended")
        for connection, resource, access in queries:
            # If it was marked stale again or decided meanwhile, the result of this query is older: ignore it.
            if (
                connection not in self._doubted
                and resource in connection.grants
                and connection.grants[resource] is access
            ):
                self._decide(connection, resource, granted.get((connection.user.id, resource)))
        self._reasons = {key: revocation for key, revocation in self._reasons.items() if key[1] in key[0].grants}

    def _decide(self, connection: "Connection", resource: Thing, access: Any) -> None:
        revocation = self._reasons.pop((connection, resource), REMOVED)
        if access is None:
            connection.lose(resource, revocation)
        else:
            connection.grants[resource] = access


def _slices(connections: Iterable["Connection"]) -> Iterator[list["Connection"]]:
    batch: list[Connection] = []
    size = 0
    for connection in connections:
        batch.append(connection)
        size += 1 + len(connection.grants)
        if size >= LOOKED_UP_AT_ONCE:
            yield batch
            batch, size = [], 0
    yield batch


def _ids(notice: dict[str, Any], name: str) -> set[UUID]:
    return {UUID(id) for id in notice.get(name, ())}


def _id(notice: dict[str, Any], name: str) -> UUID | None:
    return UUID(notice[name]) if name in notice else None
