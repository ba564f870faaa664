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
from server.realtime.grants import ResourceRef, Revocation

if TYPE_CHECKING:
    from server.realtime.connection import Connection

log = structlog.get_logger()

RECHECK_INTERVAL_SECONDS = 15.0
RETRY_DELAY_SECONDS = 0.5
MAX_BATCH = 1000  # sessions and resources per query
AccessQuery = tuple[UUID, ResourceRef]
RecheckAccess = Callable[
    [Sequence[UUID], Sequence[AccessQuery]], Awaitable[tuple[set[UUID], Mapping[AccessQuery, Any]]]
]
"""Return which of the sessions are active, and the access of each (user, resource) that has any.

Raises ServiceError.
"""
REMOVED = Revocation("removed")


class AccessMonitor:
    """The ``ChannelListener`` of the control channel: it rechecks the connections that a notice concerns."""

    def __init__(self, connections: Mapping[str, "Connection"], recheck: RecheckAccess) -> None:
        self._connections = connections
        self._query_access = recheck
        self._stale: set[Connection] = set()
        self._revocations: dict[tuple[Connection, ResourceRef], Revocation] = {}
        """The reason of each possible loss of access, until the recheck decides it."""
        self._stale_event = asyncio.Event()
        self._recheck_lock = asyncio.Lock()
        self.epoch = 0
        """Grows with every notice. Code that read access before a notice and uses it after must ``mark_stale``."""

    def mark_stale(self, connection: "Connection") -> None:
        """Schedule an immediate recheck of this connection."""
        self._stale.add(connection)
        self._stale_event.set()

    async def run(self) -> None:
        """Recheck stale connections at once, and all connections every ``RECHECK_INTERVAL_SECONDS``."""
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._recheck_stale())
            tasks.create_task(self._recheck_periodically())

    async def recheck_all(self) -> None:
        """Recheck all connections; pending joins are rechecked when they finish, because the epoch has grown."""
        self.epoch += 1
        await self._recheck_in_batches(list(self._connections.values()))

    def deliver(self, _origin: str, _kind: str, payload: bytes) -> None:
        """Apply a notice: of ended sessions, deleted resources, or changed roles of users in a project."""
        self.epoch += 1
        notice: dict[str, Any] = json.loads(payload)
        sessions, users = _ids(notice, "sessions"), _ids(notice, "users")
        project = _id(notice, "project")
        revocation = Revocation(notice["reason"], notice["actor"], notice["name"]) if "reason" in notice else None
        resources = {ResourceRef(notice["kind"], id) for id in _ids(notice, "ids")}
        for connection in list(self._connections.values()):
            if connection.user.session in sessions:
                connection.close(4401, "session ended")
            elif resources:
                for resource in resources & connection.grants.keys():
                    connection.revoke(resource, revocation or REMOVED)
            elif connection.user.id in users:
                self._invalidate(connection, project, revocation)

    def _invalidate(self, connection: "Connection", project: UUID | None, revocation: Revocation | None) -> None:
        for resource, access in connection.grants.items():
            if access is None or access.project == project:
                connection.grants[resource] = None
                self.mark_stale(connection)
                if revocation is not None:
                    self._revocations.setdefault((connection, resource), revocation)

    def on_disconnect(self) -> None:
        """Do nothing: ``recheck_all`` makes up for missed notices."""

    async def resync(self) -> None:
        """Do nothing: ``recheck_all`` has been called."""

    async def _recheck_stale(self) -> None:
        while True:
            await self._stale_event.wait()
            self._stale_event.clear()
            async with self._recheck_lock:  # a query that is already running may be older than these notices
                stale, self._stale = self._stale, set()
            # Only their stale grants: if another one is lost too, the notice with its reason is on its way.
            await self._recheck_in_batches(stale, only_stale=True)

    async def _recheck_periodically(self) -> None:
        while True:
            await asyncio.sleep(RECHECK_INTERVAL_SECONDS)
            await self.recheck_all()

    async def _recheck_in_batches(self, connections: Iterable["Connection"], *, only_stale: bool = False) -> None:
        for batch in _batches(connections):
            async with self._recheck_lock:
                await self._recheck_with_retry(batch, only_stale=only_stale)
            await asyncio.sleep(0)

    async def _recheck_with_retry(self, connections: Sequence["Connection"], *, only_stale: bool) -> None:
        while True:
            try:
                return await self._recheck_batch(connections, only_stale=only_stale)
            except ServiceError as error:
                log.warning("access recheck failed", error=error.detail, sockets=len(connections))
            except Exception:  # any other error, too: without the recheck connections would keep access that they lost
                log.exception("access recheck failed", sockets=len(connections))
            await asyncio.sleep(RETRY_DELAY_SECONDS)

    async def _recheck_batch(self, connections: Sequence["Connection"], *, only_stale: bool) -> None:
        sessions = {
            connection: connection.user.session for connection in connections if connection.id in self._connections
        }
        if not sessions:
            return
        queries = [
            (connection, resource, access)
            for connection in sessions
            for resource, access in connection.grants.items()
            if access is None or not only_stale
        ]
        active, granted = await self._query_access(
            list(set(sessions.values())), list({(connection.user.id, resource) for connection, resource, _ in queries})
        )
        for connection, session in sessions.items():
            if session not in active and connection.user.session == session:
                connection.close(4401, "session ended")
        for connection, resource, access in queries:
            # If it was marked stale again or decided meanwhile, the result of this query is older: ignore it.
            if (
                connection not in self._stale
                and resource in connection.grants
                and connection.grants[resource] is access
            ):
                self._apply_access(connection, resource, granted.get((connection.user.id, resource)))
        self._revocations = {
            key: revocation for key, revocation in self._revocations.items() if key[1] in key[0].grants
        }

    def _apply_access(self, connection: "Connection", resource: ResourceRef, access: Any) -> None:
        revocation = self._revocations.pop((connection, resource), REMOVED)
        if access is None:
            connection.revoke(resource, revocation)
        else:
            connection.grants[resource] = access


def _batches(connections: Iterable["Connection"]) -> Iterator[list["Connection"]]:
    batch: list[Connection] = []
    size = 0
    for connection in connections:
        batch.append(connection)
        size += 1 + len(connection.grants)
        if size >= MAX_BATCH:
            yield batch
            batch, size = [], 0
    yield batch


def _ids(notice: dict[str, Any], name: str) -> set[UUID]:
    return {UUID(id) for id in notice.get(name, ())}


def _id(notice: dict[str, Any], name: str) -> UUID | None:
    return UUID(notice[name]) if name in notice else None
