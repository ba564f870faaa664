"""All that is said to SAQ: one message per attempt.

SAQ neither retries nor recovers for us: the record decides, and a message that was lost is sent again.
"""

from datetime import datetime
from typing import Any

from redis.asyncio import Redis
from saq import Job
from saq.queue.redis import RedisQueue

from server.jobs.table import JobType

QUEUE = "{jobs.normal}"  # in braces: one hash slot of a Redis Cluster
MARGIN_SECONDS = 30  # SAQ's own deadline comes after ours
KEPT_SECONDS = 60


def open_queue(redis: Redis) -> RedisQueue:
    """The queue over a client: the worker's must not time out while it waits for messages."""
    return RedisQueue(redis, name=QUEUE)


async def send(queue: RedisQueue, *, job: dict[str, Any], type: JobType, at: datetime | None = None) -> None:
    """Send the next attempt of a job, due now or at ``at``."""
    claim = job["claim"] + 1
    await queue.enqueue(
        Job(
            "attempt",
            kwargs={"job": job["_id"], "claim": claim},
            key=f"{QUEUE}:{job['_id']}:{claim}",
            timeout=type.timeout + MARGIN_SECONDS,
            retries=1,
            ttl=KEPT_SECONDS,
            scheduled=int(at.timestamp() + 0.999) if at else 0,
        )
    )
