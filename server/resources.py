"""The stores a process talks to: opened in order, closed in reverse.

Only the doors know ``Resources``; below them functions get plain arguments.
"""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Iterator
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from dataclasses import dataclass
from typing import Any, cast
from urllib.parse import urlsplit

import asyncpg
import pymongo
from motor.motor_asyncio import AsyncIOMotorClient
from pymongo.errors import PyMongoError, ServerSelectionTimeoutError
from redis.asyncio import BlockingConnectionPool, Redis
from redis.asyncio.client import Pipeline
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import RedisError
from redis.exceptions import TimeoutError as RedisTimeoutError

from server import postgres, replicas
from server.budget import within
from server.errors import store_down, store_slow
from server.pipelines import REDIS_SECONDS, Pipelines
from server.replicas import Replicas
from server.settings import Settings, StartError

START_SECONDS = 3.0  # for each store at start: all three are named within 10 s
REDIS_CONNECTIONS = 50
MONGO_SECONDS = 1.5
MONGO_CONNECTIONS = 50
MONGO_ANSWER_SECONDS = 1.2  # where somebody waits: pymongo notices a little late


class StoreDownError(StartError):
    """A store cannot be reached at start; the text is one line that names it."""


@dataclass(frozen=True)
class Resources:
    settings: Settings
    db: postgres.Database
    replicas: Replicas  # of the same, for reads that may lag
    redis: Redis
    pipelines: Pipelines  # the same Redis, for what every request asks
    blocking_redis: Redis
    mongo: Any  # AsyncIOMotorDatabase, which carries no types


@asynccontextmanager
async def connect(settings: Settings) -> AsyncIterator[Resources]:
    """All stores, each asked once whether it answers.

    Raises:
        StoreDownError: one does not, within 3 s.
    """
    async with AsyncExitStack() as stack:
        db = await _started("PostgreSQL", settings.database_url, postgres.connect(settings.database_url))
        stack.push_async_callback(db.close)
        copies = await replicas.connect(stack, db, settings.database_replica_urls)
        redis = redis_client(settings.redis_url)
        stack.push_async_callback(redis.aclose)
        await _started("Redis", settings.redis_url, ping(redis))
        pipelines = Pipelines(redis)
        stack.push_async_callback(pipelines.close)
        blocking = blocking_redis_client(settings.redis_url)
        stack.push_async_callback(blocking.aclose)
        client: Any = await _started("MongoDB", settings.mongodb_uri, _open_mongo(stack, settings.mongodb_uri))
        yield Resources(
            settings=settings,
            db=db,
            replicas=copies,
            redis=redis,
            pipelines=pipelines,
            blocking_redis=blocking,
            mongo=client.get_default_database(),
        )


def redis_client(url: str) -> Redis:
    """Bounded: waits for a free connection instead of failing, gives up after a second, never repeats.

    Nothing is sent twice, because a repeated script would announce its event twice.
    """
    pool = BlockingConnectionPool.from_url(
        url,
        max_connections=REDIS_CONNECTIONS,
        timeout=REDIS_SECONDS,
        socket_timeout=REDIS_SECONDS,
        socket_connect_timeout=REDIS_SECONDS,
        socket_keepalive=True,
        retry=Retry(NoBackoff(), 0),
    )
    return TimedRedis.from_pool(pool)


class TimedRedis(Redis):
    """Every call has a deadline as a whole: a free connection, the connecting, the command, the answer."""

    async def execute_command(self, *args: Any, **options: Any) -> Any:
        with _silence():
            async with asyncio.timeout(within(REDIS_SECONDS)):
                return await super().execute_command(*args, **options)  # type: ignore[no-untyped-call]

    def pipeline(self, transaction: bool = True, shard_hint: str | None = None) -> "TimedPipeline":
        return TimedPipeline(self.connection_pool, self.response_callbacks, transaction, shard_hint)


class TimedPipeline(Pipeline):
    async def execute(self, raise_on_error: bool = True) -> list[Any]:
        with _silence():
            async with asyncio.timeout(within(REDIS_SECONDS)):
                return await super().execute(raise_on_error)


@contextmanager
def _silence() -> Iterator[None]:
    try:
        yield
    except TimeoutError as error:
        raise RedisTimeoutError("Redis did not answer in time") from error


def blocking_redis_client(url: str) -> Redis:
    """For connections that wait for Redis to speak: no read timeout; keepalive and PINGs notice a dead peer."""
    return Redis.from_url(
        url,
        socket_timeout=None,
        socket_connect_timeout=REDIS_SECONDS,
        socket_keepalive=True,
        health_check_interval=5,
        retry=Retry(NoBackoff(), 0),
    )


async def ping(redis: Redis) -> None:
    await cast("Awaitable[bool]", redis.ping())  # typed for its synchronous sibling too


async def _open_mongo(stack: AsyncExitStack, uri: str) -> Any:
    client = mongo_client(uri)
    stack.push_async_callback(asyncio.to_thread, _close_mongo, client)
    with pymongo.timeout(START_SECONDS):  # a moment longer than a request would wait
        await client.admin.command("ping")
    return client


def mongo_client(uri: str) -> Any:
    milliseconds = int(MONGO_SECONDS * 1000)
    return AsyncIOMotorClient(
        uri,
        tz_aware=True,
        uuidRepresentation="standard",
        maxPoolSize=MONGO_CONNECTIONS,
        # Of a call as a whole: with its repetition, and with the search for a server.
        timeoutMS=milliseconds,
        serverSelectionTimeoutMS=milliseconds,
        connectTimeoutMS=milliseconds,
        waitQueueTimeoutMS=milliseconds,
    )


def _close_mongo(client: Any) -> None:
    """It says goodbye to MongoDB and waits for the answer, which is not to be had of one that is silent."""
    with pymongo.timeout(MONGO_SECONDS):
        client.close()


@contextmanager
def reported() -> Iterator[None]:
    """Turns what the clients of Redis and MongoDB raise when these are away or slow into our 503, in time."""
    try:
        with pymongo.timeout(within(MONGO_ANSWER_SECONDS)):
            yield
    except RedisError as error:
        raise (store_slow if isinstance(error, RedisTimeoutError) else store_down)("Redis") from error
    except PyMongoError as error:
        raise (store_slow if _timed_out(error) else store_down)("MongoDB") from error


@asynccontextmanager
async def answered(mongo: Any) -> AsyncIterator[None]:
    """As ``reported``, for what asks MongoDB alone: in time also where a crowd asks while it is away. Each of motor's
    few threads waits for it then, and whoever got none would wait for the second round."""
    try:
        with reported():
            async with asyncio.timeout(within(MONGO_ANSWER_SECONDS)):
                yield
    except TimeoutError as error:
        raise (store_down if _is_down(mongo) else store_slow)("MongoDB") from error


def _is_down(mongo: Any) -> bool:
    """Whether connections to MongoDB fail: the client keeps looking for a server until the timeout either way."""
    topology = mongo.client.topology_description
    errors = [server.error for server in topology.server_descriptions().values()]
    return not topology.has_known_servers and any(error is not None and not _timed_out(error) for error in errors)


def _timed_out(error: Exception) -> bool:
    """Whether the server was slow. The search for a server ends at its timeout also if connections are refused."""
    if isinstance(error, ServerSelectionTimeoutError):
        return "timed out" in str(error)
    return bool(getattr(error, "timeout", False))


async def _started(name: str, url: str, opening: Awaitable[Any]) -> Any:
    try:
        async with asyncio.timeout(START_SECONDS):
            return await opening
    except (
        OSError,
        TimeoutError,
        asyncpg.PostgresError,
        asyncpg.InterfaceError,
        RedisError,
        PyMongoError,
    ) as error:
        where = urlsplit(url).netloc.rpartition("@")[2] or urlsplit(url).path
        why = " ".join(str(error).split())[:200] or "no answer in time"
        raise StoreDownError(f"{name} at {where} cannot be used: {why}") from error
