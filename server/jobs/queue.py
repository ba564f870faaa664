"""The interface to SAQ: one message per attempt, in one queue per priority class.

SAQ neither retries nor recovers jobs: the record decides, and the reconciler redelivers a lost message. Each class
has its own hash tag, so that a Redis Cluster can distribute them; hence no command uses keys of two classes.
"""

import asyncio
from collections.abc import Iterable, Sequence
from typing import Any

import orjson
import structlog
from redis.asyncio import Redis
from redis.exceptions import RedisError
from saq import Job, Status
from saq.queue.redis import RedisQueue
from saq.utils import now

from server.jobs.bell import BELL, Bell
from server.jobs.table import JobType

log = structlog.get_logger()

CLASSES = ("high", "normal", "low")  # in descending priority
UPKEEP = "upkeep"
MARGIN_SECONDS = 240  # SAQ's deadline comes after that of the job type, and after all retries of MongoDB
FORGET = -1  # SAQ keeps nothing of a finished message: the record has it
OPERATIONS = 100
ABANDONED_MILLISECONDS = 60_000  # an active message that was never started: its worker was killed
FAR = 500  # messages that a worker scans for one that it may take
PAUSE_SECONDS = 0.5  # during an outage of Redis
LOOK_SECONDS = 1.0  # a missed notification delays a message no longer than this

_ENQUEUE = """
if redis.call('ZSCORE', KEYS[1], KEYS[2]) then return nil end
redis.call('SET', KEYS[2], ARGV[1])
redis.call('ZADD', KEYS[1], 0, KEYS[2])
redis.call('RPUSH', KEYS[3], KEYS[2])
redis.call('PUBLISH', ARGV[2], '')
return 1
"""

# Takes the first message whose type and language the worker supports; the others keep their places for other workers.
# SAQ gives each message its own key in the queue's hash slot; the caller cannot name it in KEYS, since only the script
# finds it.
_TAKE = """
local has = {}
for i = 2, #ARGV do has[ARGV[i]] = true end
local function fits(message)
    local asks = message and cjson.decode(message).kwargs
    if type(asks) ~= 'table' then return true end
    return (has[asks.type] or not asks.type) and (has[asks.needs] or (asks.needs or cjson.null) == cjson.null)
end
for first = 0, ARGV[1] - 1, 10 do
    local ids = redis.call('LRANGE', KEYS[1], first, first + 9)
    for _, id in ipairs(ids) do
        local message = redis.call('GET', id)
        if fits(message) then
            redis.call('LREM', KEYS[1], 1, id)
            redis.call('RPUSH', KEYS[2], id)
            return {id, message}
        end
    end
    if #ids < 10 then return nil end
end
return nil
"""


def class_of(priority: int) -> str:
    """Return the priority class of a job's priority, 1–10."""
    return "high" if priority >= 8 else "normal" if priority >= 4 else "low"


class Lane(RedisQueue):
    """The queue of one priority class."""

    def __init__(self, redis: Redis, name: str) -> None:
        super().__init__(
            redis, name=f"{{jobs.{name}}}", dump=orjson.dumps, load=orjson.loads, max_concurrent_ops=OPERATIONS
        )
        self._enqueue_now = redis.register_script(_ENQUEUE)
        self._take = redis.register_script(_TAKE)

    async def take(self, has: Iterable[str] = ()) -> Job | None:
        """Take the next message for a worker with these types and languages, or return None at once."""
        taken: Any = await self._take(keys=[self._queued, self._active], args=[FAR, *has])
        if taken is None:
            return None
        job = self.deserialize(taken[1])
        if job is None:
            await self._forget([taken[0]])
        return job

    async def waiting(self, keys: Sequence[str]) -> set[str]:
        """Return those of these messages that exist and that no worker has taken."""
        async with self.redis.pipeline(transaction=False) as pipeline:
            pipeline.lrange(self._active, 0, -1)
            for key in keys:
                pipeline.exists(self.job_id(key))
            active, *existing = await pipeline.execute()
        taken = {self.job_key_from_id(id.decode()) for id in active}
        return {key for key, exists in zip(keys, existing, strict=True) if exists and key not in taken}

    async def notify(self, job: Job) -> None:
        """Publish nothing: clients follow the record, and SAQ's notifications have no subscriber."""

    async def sweep(self, lock: int = 60, abort: float = 5.0) -> list[str]:  # noqa: ARG002 - SAQ's signature
        """Delete the messages that killed workers had taken; the reconciler repairs their jobs."""
        redis: Any = self.redis  # its type covers the synchronous client too
        ids: list[bytes] = await redis.lrange(self._active, 0, -1)
        messages = await redis.mget(ids) if ids else []
        abandoned = [id for id, message in zip(ids, messages, strict=True) if _is_abandoned(self.deserialize(message))]
        await self._forget(abandoned)
        return [id.decode() for id in abandoned]

    async def _forget(self, ids: Sequence[bytes]) -> None:
        async with self.redis.pipeline(transaction=True) as pipeline:
            for id in ids:
                pipeline.lrem(self._active, 0, id)  # type: ignore[arg-type]
                pipeline.zrem(self._incomplete, id)
                pipeline.delete(id)
            await pipeline.execute()

    async def _enqueue(self, job: Job) -> Job | None:
        """Enqueue as SAQ does, and notify the waiting workers."""
        if job.scheduled:
            return await super()._enqueue(job)
        enqueued = await self._enqueue_now(
            keys=[self._incomplete, job.id, self._queued], args=[self.serialize(job), BELL]
        )
        return job if enqueued else None


def _is_abandoned(job: Job | None) -> bool:
    if job is None:
        return True
    return job.stuck or (job.status == Status.QUEUED and _age(job) > ABANDONED_MILLISECONDS)


def _age(job: Job) -> int:
    return now() - job.queued


def lanes(redis: Redis) -> dict[str, Lane]:
    return {name: Lane(redis, name) for name in CLASSES}


def message(job: dict[str, Any], type: JobType) -> Job:
    """Return the message for a job's next attempt."""
    claim = job["claim"] + 1
    return Job(
        "attempt",
        kwargs={"job": job["_id"], "claim": claim, "type": type.name, "needs": type.needs(job["payload"])},
        key=key_of(job),
        timeout=type.timeout + MARGIN_SECONDS,
        retries=1,
        ttl=FORGET,
    )


def key_of(job: dict[str, Any]) -> str:
    return f"{{jobs.{class_of(job['priority'])}}}:{job['_id']}:{job['claim'] + 1}"


class InOrder(RedisQueue):
    """Several queues as one, for a worker: weighted by priority class, so that none starves.

    ``capabilities`` are the types and languages of this worker; it leaves other messages to other workers.
    """

    def __init__(self, redis: Redis, lanes: Sequence[Lane], bell: Bell, *, has: Iterable[str]) -> None:
        super().__init__(redis, name="{jobs}")
        self._lanes = lanes
        self._bell = bell
        self._has = tuple(has)
        self._turn = asyncio.Lock()
        self._taken = 0
        self._closed = False

    def close(self) -> None:
        """Stop taking messages; ``dequeue`` then returns None."""
        self._closed = True
        self._bell.work.set()

    async def dequeue(self, timeout: float = 0.0, poll_interval: float = 0.0) -> Job | None:  # noqa: ARG002
        async with self._turn:
            while not self._closed:
                self._bell.work.clear()
                try:
                    job = await self._next()
                except (RedisError, OSError) as error:
                    log.warning("queue unreachable", error=str(error))
                    await asyncio.sleep(PAUSE_SECONDS)
                    continue
                if job is not None:
                    return job
                await self._listen()
        return None

    async def schedule(self, lock: int = 1) -> list[str]:
        return [id for queue in self._lanes for id in await queue.schedule(lock)]

    async def sweep(self, lock: int = 60, abort: float = 5.0) -> list[str]:
        return [id for queue in self._lanes for id in await queue.sweep(lock, abort)]

    async def worker_info(self, worker_id: str, queue_key: str, metadata: Any = None, ttl: int = 60) -> Any:
        """Report this worker to the dashboard for each of its queues."""
        for queue in self._lanes:
            await queue.worker_info(worker_id, queue_key=queue.name, metadata=metadata, ttl=ttl)
        return await super().worker_info(worker_id, queue_key=queue_key, metadata=metadata, ttl=ttl)

    async def _next(self) -> Job | None:
        for queue in in_turn(self._lanes, self._taken):
            job = await queue.take(self._has)
            if job is not None:
                self._taken += 1
                return job
        return None

    async def _listen(self) -> None:
        try:
            async with asyncio.timeout(LOOK_SECONDS):
                await self._bell.work.wait()
        except TimeoutError:
            pass


def in_turn(lanes: Sequence[Lane], taken: int) -> Iterable[Lane]:
    """Yield the queues in the order to try: of ten turns, one starts with the lowest class, one with the second."""
    first = len(lanes) - 1 if taken % 10 == 9 else min(1, len(lanes) - 1) if taken % 10 == 4 else 0
    yield lanes[first]
    yield from (queue for queue in lanes if queue is not lanes[first])


class UpkeepLane(Lane):
    """The queue of the workers' own periodic tasks."""

    def __init__(self, redis: Redis) -> None:
        super().__init__(redis, UPKEEP)

    async def dequeue(self, timeout: float = 0.0, poll_interval: float = 0.0) -> Job | None:  # noqa: ARG002
        try:
            job = await self.take()
        except (RedisError, OSError) as error:
            log.warning("queue unreachable", queue=self.name, error=str(error))
            job = None
        if job is None:
            await asyncio.sleep(PAUSE_SECONDS)
        return job
