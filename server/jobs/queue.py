"""All that is said to SAQ: one message per attempt, in a queue per priority class.

SAQ neither retries nor recovers for us: the record decides, and a message that was lost is sent again. Each class
has a hash tag of its own, so that a Redis Cluster can spread them; hence no command names two of them.
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

CLASSES = ("high", "normal", "low")  # in the order in which they are drained
UPKEEP = "upkeep"
MARGIN_SECONDS = 240  # SAQ's own deadline comes after ours, and after all our patience with MongoDB
FORGET = -1  # what SAQ keeps of a finished message: nothing, the record tells
OPERATIONS = 100
ABANDONED_MILLISECONDS = 60_000  # a message in hand that was never begun: its worker was killed
FAR = 500  # messages that a worker may not take are passed over, up to so many
PAUSE_SECONDS = 0.5  # while Redis is away
LOOK_SECONDS = 1.0  # a bell that was not heard delays no longer than this

_ENQUEUE = """
if redis.call('ZSCORE', KEYS[1], KEYS[2]) then return nil end
redis.call('SET', KEYS[2], ARGV[1])
redis.call('ZADD', KEYS[1], 0, KEYS[2])
redis.call('RPUSH', KEYS[3], KEYS[2])
redis.call('PUBLISH', ARGV[2], '')
return 1
"""

# The first message that asks for nothing that the worker has not; what it may not take stays in its place, for others.
# SAQ gives every message a key of its own in the queue's slot; it is known only here.
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
    return "high" if priority >= 8 else "normal" if priority >= 4 else "low"


class Lane(RedisQueue):
    """The queue of one class."""

    def __init__(self, redis: Redis, name: str) -> None:
        super().__init__(
            redis, name=f"{{jobs.{name}}}", dump=orjson.dumps, load=orjson.loads, max_concurrent_ops=OPERATIONS
        )
        self._enqueue_now = redis.register_script(_ENQUEUE)
        self._take = redis.register_script(_TAKE)

    async def take(self, has: Iterable[str] = ()) -> Job | None:
        """The next message for a worker that has these types and languages, without waiting for one."""
        taken: Any = await self._take(keys=[self._queued, self._active], args=[FAR, *has])
        if taken is None:
            return None
        job = self.deserialize(taken[1])
        if job is None:
            await self._forget([taken[0]])
        return job

    async def waiting(self, keys: Sequence[str]) -> set[str]:
        """Those of these messages that are there and in nobody's hands."""
        async with self.redis.pipeline(transaction=False) as pipeline:
            pipeline.lrange(self._active, 0, -1)
            for key in keys:
                pipeline.exists(self.job_id(key))
            active, *there = await pipeline.execute()
        taken = {self.job_key_from_id(id.decode()) for id in active}
        return {key for key, exists in zip(keys, there, strict=True) if exists and key not in taken}

    async def notify(self, job: Job) -> None:
        """Nobody listens to SAQ: what people watch is the record."""

    async def sweep(self, lock: int = 60, abort: float = 5.0) -> list[str]:  # noqa: ARG002 - SAQ's signature
        """Forget the messages that killed workers had in their hands. Their jobs are the reconciler's business."""
        redis: Any = self.redis  # typed for its synchronous sibling too
        ids: list[bytes] = await redis.lrange(self._active, 0, -1)
        messages = await redis.mget(ids) if ids else []
        dead = [id for id, message in zip(ids, messages, strict=True) if _is_abandoned(self.deserialize(message))]
        await self._forget(dead)
        return [id.decode() for id in dead]

    async def _forget(self, ids: Sequence[bytes]) -> None:
        async with self.redis.pipeline(transaction=True) as pipeline:
            for id in ids:
                pipeline.lrem(self._active, 0, id)  # type: ignore[arg-type]
                pipeline.zrem(self._incomplete, id)
                pipeline.delete(id)
            await pipeline.execute()

    async def _enqueue(self, job: Job) -> Job | None:
        """As SAQ does, and ring for whoever waits."""
        if job.scheduled:
            return await super()._enqueue(job)
        done = await self._enqueue_now(keys=[self._incomplete, job.id, self._queued], args=[self.serialize(job), BELL])
        return job if done else None


def _is_abandoned(job: Job | None) -> bool:
    if job is None:
        return True
    return job.stuck or (job.status == Status.QUEUED and _age(job) > ABANDONED_MILLISECONDS)


def _age(job: Job) -> int:
    return now() - job.queued


def lanes(redis: Redis) -> dict[str, Lane]:
    return {name: Lane(redis, name) for name in CLASSES}


def message(job: dict[str, Any], type: JobType) -> Job:
    """The message of a job's next attempt."""
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
    """Several lanes as one, for a worker: the highest class first, and now and then another, so that none starves.

    ``has`` are the types and languages of this worker; what needs others is left to others.
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
        """No more messages; whoever waits for one is told that there is none."""
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
        return [id for lane in self._lanes for id in await lane.schedule(lock)]

    async def sweep(self, lock: int = 60, abort: float = 5.0) -> list[str]:
        return [id for lane in self._lanes for id in await lane.sweep(lock, abort)]

    async def worker_info(self, worker_id: str, queue_key: str, metadata: Any = None, ttl: int = 60) -> Any:
        """For the dashboard: at work on every lane."""
        for lane in self._lanes:
            await lane.worker_info(worker_id, queue_key=lane.name, metadata=metadata, ttl=ttl)
        return await super().worker_info(worker_id, queue_key=queue_key, metadata=metadata, ttl=ttl)

    async def _next(self) -> Job | None:
        for lane in in_turn(self._lanes, self._taken):
            job = await lane.take(self._has)
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
    """The highest class first; of ten messages one is taken from the lowest first, one from the second."""
    first = len(lanes) - 1 if taken % 10 == 9 else min(1, len(lanes) - 1) if taken % 10 == 4 else 0
    yield lanes[first]
    yield from (lane for lane in lanes if lane is not lanes[first])


class UpkeepLane(Lane):
    """The queue of the workers' own housekeeping."""

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
