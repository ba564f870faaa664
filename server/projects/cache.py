"""Projects as GET shows them, kept for five minutes: single ones in Redis, those of lists in the process.

The key holds the revision, which the query of access or of the list returns: what is found can never be stale, in any
process, and nothing needs to be invalidated. Without Redis everything is read from PostgreSQL.
"""

import asyncio
from collections.abc import Sequence
from typing import Any
from uuid import UUID

import orjson
from aiohttp import web
from cachetools import LRUCache
from redis.exceptions import RedisError

from server import json, metrics
from server.pipelines import Pipelines
from server.postgres import Executor
from server.projects import schemas, store

KEPT_SECONDS = 300
LISTED_BYTES = 16 << 20  # of JSON, in a process
PATIENCE_SECONDS = 0.2  # a cache that takes longer is none


async def find(redis: Pipelines, *, project: UUID, revision: int, role: str) -> bytes | None:
    try:
        found: bytes | None = await redis.ask("GET", _key(project, revision, role), seconds=PATIENCE_SECONDS)
    except (RedisError, OSError, TimeoutError):
        found = None
    metrics.PROJECT_CACHE.labels("redis", "miss" if found is None else "hit").inc()
    return found


async def keep(redis: Pipelines, body: bytes, *, project: UUID, revision: int, role: str) -> None:
    try:
        key = _key(project, revision, role)
        await redis.ask("SET", key, body, "EX", KEPT_SECONDS, seconds=PATIENCE_SECONDS)
    except (RedisError, OSError, TimeoutError):
        return


class Listed:
    """Projects as lists show them, remembered by this process: a list of twenty asks for what has changed in them."""

    def __init__(self) -> None:
        self._shown: LRUCache[tuple[UUID, int, str], bytes] = LRUCache(LISTED_BYTES, getsizeof=len)
        self._forgotten_at = 0.0

    async def show(self, db: Executor, rows: Sequence[Any]) -> list[orjson.Fragment]:
        """JSON of each, in their order; ``rows`` tell id, revision and role. One that is gone by now is left out."""
        self._forget()
        shown = {row["id"]: self._shown.get((row["id"], row["revision"], row["role"])) for row in rows}
        missing = {row["id"]: row["role"] for row in rows if shown[row["id"]] is None}
        metrics.PROJECT_CACHE.labels("process", "hit").inc(len(rows) - len(missing))
        if missing:
            metrics.PROJECT_CACHE.labels("process", "miss").inc(len(missing))
            for project in await store.read_projects(db, projects=list(missing)):
                id, role = project["id"], missing[project["id"]]
                text = json.dumps(_PROJECT.dump({**project, "role": role}))
                # It may have changed since it was listed: what is kept is what was read.
                shown[id] = self._shown[id, project["revision"], role] = text
        return [orjson.Fragment(each) for each in shown.values() if each is not None]

    def _forget(self) -> None:
        now = asyncio.get_running_loop().time()
        if now - self._forgotten_at > KEPT_SECONDS:
            self._forgotten_at = now
            self._shown.clear()


LISTED = web.AppKey("listed", Listed)
_PROJECT = schemas.Project()


def _key(project: UUID, revision: int, role: str) -> str:
    return f"project:{project}:{revision}:{role}"
