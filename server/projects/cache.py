"""A cache of projects as GET returns them, for five minutes: single ones in Redis, those of lists in the process.

The key contains the revision, which the access query or the list query returns: an entry can never be stale, in any
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

CACHE_TTL_SECONDS = 300
MAX_LIST_CACHE_BYTES = 16 << 20  # of JSON, in a process
CACHE_TIMEOUT_SECONDS = 0.2  # a slower cache is of no use


async def get(redis: Pipelines, *, project: UUID, revision: int, role: str) -> bytes | None:
    try:
        body: bytes | None = await redis.submit("GET", _key(project, revision, role), timeout=CACHE_TIMEOUT_SECONDS)
    except (RedisError, OSError, TimeoutError):
        body = None
    metrics.PROJECT_CACHE.labels("redis", "miss" if body is None else "hit").inc()
    return body


async def put(redis: Pipelines, body: bytes, *, project: UUID, revision: int, role: str) -> None:
    try:
        key = _key(project, revision, role)
        await redis.submit("SET", key, body, "EX", CACHE_TTL_SECONDS, timeout=CACHE_TIMEOUT_SECONDS)
    except (RedisError, OSError, TimeoutError):
        return


class ProjectListCache:
    """A cache of the projects in lists, in this process: a list reads only the projects that have changed."""

    def __init__(self) -> None:
        self._entries: LRUCache[tuple[UUID, int, str], bytes] = LRUCache(MAX_LIST_CACHE_BYTES, getsizeof=len)
        self._cleared_at = 0.0

    async def render(self, db: Executor, rows: Sequence[Any]) -> list[orjson.Fragment]:
        """Return the JSON of each row (id, revision, role), in their order; without projects deleted since."""
        self._clear_if_expired()
        bodies = {row["id"]: self._entries.get((row["id"], row["revision"], row["role"])) for row in rows}
        missing = {row["id"]: row["role"] for row in rows if bodies[row["id"]] is None}
        metrics.PROJECT_CACHE.labels("process", "hit").inc(len(rows) - len(missing))
        if missing:
            metrics.PROJECT_CACHE.labels("process", "miss").inc(len(missing))
            for project in await store.read_projects(db, projects=list(missing)):
                id, role = project["id"], missing[project["id"]]
                body = json.dumps(_PROJECT.dump({**project, "role": role}))
                # The project may have changed since it was listed: the key has the revision that was read.
                bodies[id] = self._entries[id, project["revision"], role] = body
        return [orjson.Fragment(body) for body in bodies.values() if body is not None]

    def _clear_if_expired(self) -> None:
        now = asyncio.get_running_loop().time()
        if now - self._cleared_at > CACHE_TTL_SECONDS:
            self._cleared_at = now
            self._entries.clear()


PROJECT_LIST_CACHE = web.AppKey("project_list_cache", ProjectListCache)
_PROJECT = schemas.Project()


def _key(project: UUID, revision: int, role: str) -> str:
    return f"project:{project}:{revision}:{role}"
