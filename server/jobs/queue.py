"""The interface to SAQ: one message per attempt, in one queue per priority class.

SAQ neither retries nor recovers jobs: the record decides, and the reconciler redelivers a lost message. Each class
has its own hash tag, so that a Redis Cluster can distribute the classes; no command may use keys of two classes.
"""

import asyncio
from collections.abc import Iterable, Sequence
from typing import Any

import orjson
import structlog
from redis.asyncio import Redis
from redis.exceptions import RedisError
from saq import Job as SaqJob
from saq import Status
from saq.queue.redis import RedisQueue
from saq.utils import now

from server.jobs.notifier import NOTIFICATION_CHANNEL, JobNotifier
from server.jobs.table import JobType

log = structlog.get_logger()

PRIORITY_CLASSES = ("high", "normal", "low")  # in descending priority
MAINTENANCE = "upkeep"  # the name in Redis stays: workers of two versions share the queue during a rolling upgrade
TIMEOUT_MARGIN_SECONDS = 240  # SAQ's deadline comes after that of the job type, and after all retries of MongoDB
DELETE_WHEN_FINISHED = -1  # SAQ keeps nothing of a finished message: the record has it
MAX_CONCURRENT_OPERATIONS = 100
ABANDONED_AFTER_MILLISECONDS = 60_000  # an active message that was never started: its worker was killed
MAX_SCANNED_MESSAGES = 500  # messages that a worker scans for one that it may take
REDIS_RETRY_INTERVAL_SECONDS = 0.5  # during an outage of Redis
POLL_INTERVAL_SECONDS = 1.0  # a missed notification delays a message no longer than this

_ENQUEUE_SCRIPT = """
if redis.call('ZSCORE', KEYS[1], KEYS[2]) then return nil end
redis.call('SET', KEYS[2], ARGV[1])
redis.call('ZADD', KEYS[1], 0, KEYS[2])
redis.call('RPUSH', KEYS[3], KEYS[2])
redis.call('PUBLISH', ARGV[2], '')
return 1
"""

# Takes the first message whose type and language the worker supports. The others keep their places, for other workers.
# SAQ gives each message its own key in the queue's hash slot; the caller cannot name it in KEYS, since only the script
# finds it.
_TAKE_SCRIPT = """
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


def priority_class(priority: int) -> str:
    """Return the priority class of a job's priority, 1–10."""
    return "high" if priority >= 8 else "normal" if priority >= 4 else "low"


class PriorityQueue(RedisQueue):
    """The queue of one priority class."""

    def __init__(self, redis: Redis, name: str) -> None:
        super().__init__(
            redis,
            name=f"{{jobs.{name}}}",
            dump=orjson.dumps,
            load=orjson.loads,
            max_concurrent_ops=MAX_CONCURRENT_OPERATIONS,
        )
        self._push_script = redis.register_script(_ENQUEUE_SCRIPT)
        self._take_script = redis.register_script(_TAKE_SCRIPT)

    async def take(self, capabilities: Iterable[str] = ()) -> SaqJob | None:
        """Take the next message for a worker with these types and languages, or return None at once."""
        taken: Any = await self._take_script(
            keys=[self._queued, self._active], args=[MAX_SCANNED_MESSAGES, *capabilities]
        )
        if taken is None:
            return None
        job = self.deserialize(taken[1])
        if job is None:
            await self._delete_messages([taken[0]])
        return job

    async def queued_keys(self, keys: Sequence[str]) -> set[str]:
        """Return those of these messages that exist and that no worker has taken."""
        async with self.redis.pipeline(transaction=False) as pipeline:
            pipeline.lrange(self._active, 0, -1)
            for key in keys:
                pipeline.exists(self.job_id(key))
            active, *existing = await pipeline.execute()
        taken = {self.job_key_from_id(id.decode()) for id in active}
        return {key for key, exists in zip(keys, existing, strict=True) if exists and key not in taken}

    async def notify(self, job: SaqJob) -> None:
        """Publish nothing: clients follow the record, and SAQ's notifications have no subscriber."""

    async def sweep(self, lock: int = 60, abort: float = 5.0) -> list[str]:  # noqa: ARG002 - SAQ's signature
        """Delete the messages that killed workers had taken; the reconciler repairs their jobs."""
        redis: Any = self.redis  # its type covers the synchronous client too
        ids: list[bytes] = await redis.lrange(self._active, 0, -1)
        messages = await redis.mget(ids) if ids else []
        abandoned = [id for id, message in zip(ids, messages, strict=True) if _is_abandoned(self.deserialize(message))]
        await self._delete_messages(abandoned)
        return [id.decode() for id in abandoned]

    async def _delete_messages(self, ids: Sequence[bytes]) -> None:
        async with self.redis.pipeline(transaction=True) as pipeline:
            for id in ids:
                pipeline.lrem(self._active, 0, id)  # type: ignore[arg-type]
                pipeline.zrem(self._incomplete, id)
                pipeline.delete(id)
            await pipeline.execute()

    async def _enqueue(self, job: SaqJob) -> SaqJob | None:
        """Enqueue as SAQ does, and notify the waiting workers."""
        if job.scheduled:
            return await super()._enqueue(job)
        enqueued = await self._push_script(
            keys=[self._incomplete, job.id, self._queued], args=[self.serialize(job), NOTIFICATION_CHANNEL]
        )
        return job if enqueued else None


def _is_abandoned(job: SaqJob | None) -> bool:
    if job is None:
        return True
    return job.stuck or (job.status == Status.QUEUED and _age(job) > ABANDONED_AFTER_MILLISECONDS)


def _age(job: SaqJob) -> int:
    return now() - job.queued


def priority_queues(redis: Redis) -> dict[str, PriorityQueue]:
    return {name: PriorityQueue(redis, name) for name in PRIORITY_CLASSES}


def make_message(job: dict[str, Any], type: JobType) -> SaqJob:
    """Return the message for a job's next attempt."""
    claim = job["claim"] + 1
    return SaqJob(
        "attempt",
        kwargs={"job": job["_id"], "claim": claim, "type": type.name, "needs": type.required_language(job["payload"])},
        key=message_key(job),
        timeout=type.timeout + TIMEOUT_MARGIN_SECONDS,
        retries=1,
        ttl=DELETE_WHEN_FINISHED,
    )


def message_key(job: dict[str, Any]) -> str:
    return f"{{jobs.{priority_class(job['priority'])}}}:{job['_id']}:{job['claim'] + 1}"


class WeightedOrder(RedisQueue):
    """Several queues as one, for a worker: weighted by priority class, so that none starves.

    ``capabilities`` are the types and languages of this worker; it leaves other messages to other workers.
    """

    def __init__(
        self, redis: Redis, queues: Sequence[PriorityQueue], notifier: JobNotifier, *, capabilities: Iterable[str]
    ) -> None:
        super().__init__(redis, name="{jobs}")
        self._queues = queues
        self._notifier = notifier
        self._capabilities = tuple(capabilities)
        self._dequeue_lock = asyncio.Lock()
        self._taken_count = 0
        self._closed = False

    def close(self) -> None:
        """Stop taking messages; ``dequeue`` then returns None."""
        self._closed = True
        self._notifier.work_available.set()

    async def dequeue(self, timeout: float = 0.0, poll_interval: float = 0.0) -> SaqJob | None:  # noqa: ARG002
        async with self._dequeue_lock:
            while not self._closed:
                self._notifier.work_available.clear()
                try:
                    job = await self._take_next()
                except (RedisError, OSError) as error:
                    log.warning("queue unreachable", error=str(error))
                    await asyncio.sleep(REDIS_RETRY_INTERVAL_SECONDS)
                    continue
                if job is not None:
                    return job
                await self._wait_for_work()
        return None

    async def schedule(self, lock: int = 1) -> list[str]:
        return [id for queue in self._queues for id in await queue.schedule(lock)]

    async def sweep(self, lock: int = 60, abort: float = 5.0) -> list[str]:
        return [id for queue in self._queues for id in await queue.sweep(lock, abort)]

    async def worker_info(self, worker_id: str, queue_key: str, metadata: Any = None, ttl: int = 60) -> Any:
        """Report this worker to the dashboard for each of its queues."""
        for queue in self._queues:
            await queue.worker_info(worker_id, queue_key=queue.name, metadata=metadata, ttl=ttl)
        return await super().worker_info(worker_id, queue_key=queue_key, metadata=metadata, ttl=ttl)

    async def _take_next(self) -> SaqJob | None:
        for queue in next_queue(self._queues, self._taken_count):
            job = await queue.take(self._capabilities)
            if job is not None:
                self._taken_count += 1
                return job
        return None

    async def _wait_for_work(self) -> None:
        try:
            async with asyncio.timeout(POLL_INTERVAL_SECONDS):
                await self._notifier.work_available.wait()
        except TimeoutError:
            pass


def next_queue(queues: Sequence[PriorityQueue], taken: int) -> Iterable[PriorityQueue]:
    """Yield the queues in the order to try: of ten turns, one starts with the lowest class, one with the second."""
    first = len(queues) - 1 if taken % 10 == 9 else min(1, len(queues) - 1) if taken % 10 == 4 else 0
    yield queues[first]
    yield from (queue for queue in queues if queue is not queues[first])


class MaintenanceQueue(PriorityQueue):
    """The queue of the workers' own periodic tasks."""

    def __init__(self, redis: Redis) -> None:
        super().__init__(redis, MAINTENANCE)

    async def dequeue(self, timeout: float = 0.0, poll_interval: float = 0.0) -> SaqJob | None:  # noqa: ARG002
        try:
            job = await self.take()
        except (RedisError, OSError) as error:
            log.warning("queue unreachable", queue=self.name, error=str(error))
            job = None
        if job is None:
            await asyncio.sleep(REDIS_RETRY_INTERVAL_SECONDS)
        return job
