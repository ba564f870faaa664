"""Reads on replicas of PostgreSQL, which lag: DATABASE_REPLICA_URLS.

Who may do what is always asked of the primary. What a replica says counts where it is as new as what the primary has
just told (the proof), so that nobody misses their own write nor what an event has told them of, or where it cannot
change; else the primary is asked. A replica that fails is left alone for a moment, and the primary stands in.
"""

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence
from contextlib import AsyncExitStack
from typing import TypeVar

import asyncpg
import structlog

from server import metrics, postgres
from server.budget import within
from server.errors import NotFound, Unavailable
from server.postgres import Database, Executor

log = structlog.get_logger()

ANSWER_SECONDS = 0.5  # then there is time left for the primary
REST_SECONDS = 2.0
POOL_SIZE = 10
T = TypeVar("T")
Proof = Callable[[Executor], Awaitable[bool]]
"""Whether this replica is new enough. Asked before the read: what it has applied, it keeps."""


class Replicas:
    def __init__(self, primary: Database, replicas: Sequence[Database] = ()) -> None:
        self._primary = primary
        self._replicas = replicas
        self._resting_until = dict.fromkeys(replicas, 0.0)
        self._turn = 0

    async def read(self, ask: Callable[[Database], Awaitable[T]], *, proof: Proof | None = None) -> T:
        """What ``ask`` finds: on a replica, or on the primary where the replica cannot prove it or has not found it.

        Without a proof it must be something that does not change once it is there.
        """
        replica = self._next()
        if replica is not None:
            limit = within(ANSWER_SECONDS)
            patient_until = time.monotonic() + limit
            try:
                async with asyncio.timeout(limit):
                    if proof is None or await proof(replica):
                        found = await ask(replica)
                        metrics.REPLICA_READS.labels("replica").inc()
                        return found
            except NotFound:
                pass  # not there yet
            except (Unavailable, TimeoutError, asyncpg.PostgresError) as error:
                # A request that had less time left says nothing about the replica.
                if limit == ANSWER_SECONDS or time.monotonic() < patient_until:
                    self._rest(replica, error)
            metrics.REPLICA_READS.labels("primary").inc()
        return await ask(self._primary)

    def _rest(self, replica: Database, error: Exception) -> None:
        self._resting_until[replica] = time.monotonic() + REST_SECONDS
        log.warning("replica left alone", error=str(error) or type(error).__name__, seconds=REST_SECONDS)

    def _next(self) -> Database | None:
        """They take turns; None where there is none to ask."""
        now = time.monotonic()
        for _ in self._replicas:
            self._turn = (self._turn + 1) % len(self._replicas)
            chosen = self._replicas[self._turn]
            if self._resting_until[chosen] <= now:
                return chosen
        return None


async def connect(stack: AsyncExitStack, primary: Database, urls: Sequence[str]) -> Replicas:
    """A pool for each, to be closed with ``stack``. One that is down at the start is asked again later."""
    replicas = []
    for url in urls:
        replica = await postgres.connect(url, size=POOL_SIZE, least=0)
        stack.push_async_callback(replica.close)
        replicas.append(replica)
    return Replicas(primary, replicas)
