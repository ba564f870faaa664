"""Reads on replicas of PostgreSQL, which lag: DATABASE_REPLICA_URLS.

Permissions always come from the primary. A replica serves a read if it has at least the revision that
the access query read from the primary (the freshness check), so that users see their own writes and all that an event
has announced, or if the row cannot change; else the primary serves it. A circuit breaker pauses a replica that fails,
and the primary takes its reads.
"""

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence
from contextlib import AsyncExitStack
from typing import TypeVar

import asyncpg
import structlog

from server import metrics, postgres
from server.deadline import remaining
from server.errors import NotFound, Unavailable
from server.postgres import Database, Executor

log = structlog.get_logger()

REPLICA_TIMEOUT_SECONDS = 0.5  # leaves time for the primary within the deadline of the request
CIRCUIT_OPEN_SECONDS = 2.0
MAX_POOL_SIZE = 10
T = TypeVar("T")
FreshnessCheck = Callable[[Executor], Awaitable[bool]]
"""Returns whether a replica is fresh enough. It runs before the read: a replica never loses what it has applied."""


class Replicas:
    def __init__(self, primary: Database, replicas: Sequence[Database] = ()) -> None:
        self._primary = primary
        self._replicas = replicas
        self._circuit_open_until = dict.fromkeys(replicas, 0.0)
        self._next_index = 0

    async def read(self, query: Callable[[Database], Awaitable[T]], *, is_fresh: FreshnessCheck | None = None) -> T:
        """Run ``query`` on a replica, or on the primary if the replica is stale, fails or does not find the row.

        Without a freshness check the row must be immutable.
        """
        replica = self._next_replica()
        if replica is not None:
            limit = remaining(REPLICA_TIMEOUT_SECONDS)
            deadline = time.monotonic() + limit
            try:
                async with asyncio.timeout(limit):
                    if is_fresh is None or await is_fresh(replica):
                        result = await query(replica)
                        metrics.REPLICA_READS.labels("replica").inc()
                        return result
            except NotFound:
                pass  # not replicated yet
            except (Unavailable, TimeoutError, asyncpg.PostgresError) as error:
                # If the request's deadline was shorter, its timeout says nothing about the replica.
                if limit == REPLICA_TIMEOUT_SECONDS or time.monotonic() < deadline:
                    self._open_circuit(replica, error)
            metrics.REPLICA_READS.labels("primary").inc()
        return await query(self._primary)

    def _open_circuit(self, replica: Database, error: Exception) -> None:
        self._circuit_open_until[replica] = time.monotonic() + CIRCUIT_OPEN_SECONDS
        log.warning("replica circuit opened", error=str(error) or type(error).__name__, seconds=CIRCUIT_OPEN_SECONDS)

    def _next_replica(self) -> Database | None:
        """Return the next replica, round robin; None if the circuit of every replica is open."""
        now = time.monotonic()
        for _ in self._replicas:
            self._next_index = (self._next_index + 1) % len(self._replicas)
            replica = self._replicas[self._next_index]
            if self._circuit_open_until[replica] <= now:
                return replica
        return None


async def connect(stack: AsyncExitStack, primary: Database, urls: Sequence[str]) -> Replicas:
    """Open a pool for each replica, to be closed with ``stack``. A replica that is down at the start is tried later."""
    replicas = []
    for url in urls:
        replica = await postgres.connect(url, max_size=MAX_POOL_SIZE, min_size=0)
        stack.push_async_callback(replica.close)
        replicas.append(replica)
    return Replicas(primary, replicas)
