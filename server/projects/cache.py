"""Projects as GET shows them, kept in Redis for five minutes.

The key holds the revision, which the access query returns: what is found can never be stale, in any process, and
nothing needs to be invalidated. Without Redis everything is read from PostgreSQL.
"""

from uuid import UUID

from redis.exceptions import RedisError

from server import metrics
from server.pipelines import Pipelines

KEPT_SECONDS = 300
PATIENCE_SECONDS = 0.2  # a cache that takes longer is none


async def find(redis: Pipelines, *, project: UUID, revision: int, role: str) -> bytes | None:
    try:
        found: bytes | None = await redis.ask("GET", _key(project, revision, role), seconds=PATIENCE_SECONDS)
    except (RedisError, OSError, TimeoutError):
        found = None
    metrics.PROJECT_CACHE.labels("miss" if found is None else "hit").inc()
    return found


async def keep(redis: Pipelines, body: bytes, *, project: UUID, revision: int, role: str) -> None:
    try:
        key = _key(project, revision, role)
        await redis.ask("SET", key, body, "EX", KEPT_SECONDS, seconds=PATIENCE_SECONDS)
    except (RedisError, OSError, TimeoutError):
        return


def _key(project: UUID, revision: int, role: str) -> str:
    return f"project:{project}:{revision}:{role}"
