"""The connections of a process to its stores: opened in order, closed in reverse.

Only the transports know ``Resources``; below them functions take plain arguments.
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

START_SECONDS = 3.0  # for each store at start, so that all three are checked within 10 s
REDIS_CONNECTIONS = 50
MONGO_SECONDS = 1.5
MONGO_CONNECTIONS = 50
MONGO_ANSWER_SECONDS = 1.2  # while a request waits: pymongo notices a timeout a little late


class StoreDownError(StartError):
    """A store cannot be reached at start; the text is one line that names it."""


@dataclass(frozen=True)
class Resources:
    settings: Settings
    db: postgres.Database
    replicas: Replicas  # of the same database, for reads that may lag
    redis: Redis
    pipelines: Pipelines  # the same Redis, for the commands of every request
    blocking_redis: Redis
    mongo: Any  # AsyncIOMotorDatabase, which carries no types


@asynccontextmanager
async def connect(settings: Settings) -> AsyncIterator[Resources]:
    """Connect to all stores and check each once.

    Raises:
        StoreDownError: a store does not respond within 3 s.
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
    """Return a client with a bounded pool: it waits for a free connection, times out after a second, never retries.

    A retried script would announce its event twice.
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
    """A client whose calls each have one timeout for everything: a free connection, connecting, command and reply."""

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
    """Return a client for connections that wait for messages.

    It has no read timeout; keepalive and PINGs detect a dead peer.
    """
    return Redis.from_url(
        url,
        socket_timeout=None,
        socket_connect_timeout=REDIS_SECONDS,
        socket_keepalive=True,
        health_check_interval=5,
        retry=Retry(NoBackoff(), 0),
    )


async def ping(redis: Redis) -> None:
    await cast("Awaitable[bool]", redis.ping())  # its type is that of the synchronous client, too


async def _open_mongo(stack: AsyncExitStack, uri: str) -> Any:
    client = mongo_client(uri)
    stack.push_async_callback(asyncio.to_thread, _close_mongo, client)
    with pymongo.timeout(START_SECONDS):  # longer than the timeout of requests
        await client.admin.command("ping")
    return client


def mongo_client(uri: str) -> Any:
    milliseconds = int(MONGO_SECONDS * 1000)
    return AsyncIOMotorClient(
        uri,
        tz_aware=True,
        uuidRepresentation="standard",
        maxPoolSize=MONGO_CONNECTIONS,
        # For a call as a whole: with its retry, and with server selection.
        timeoutMS=milliseconds,
        serverSelectionTimeoutMS=milliseconds,
        connectTimeoutMS=milliseconds,
        waitQueueTimeoutMS=milliseconds,
    )


def _close_mongo(client: Any) -> None:
    """Close the client with a timeout: it ends its sessions on the server, and a hanging server does not respond."""
    with pymongo.timeout(MONGO_SECONDS):
        client.close()


@contextmanager
def reported() -> Iterator[None]:
    """Translate errors of Redis and MongoDB to a 503 that says whether the store is down or slow, within a timeout."""
    try:
        with pymongo.timeout(within(MONGO_ANSWER_SECONDS)):
            yield
    except RedisError as error:
        raise (store_slow if isinstance(error, RedisTimeoutError) else store_down)("Redis") from error
    except PyMongoError as error:
        raise (store_slow if _timed_out(error) else store_down)("MongoDB") from error


@asynccontextmanager
async def answered(mongo: Any) -> AsyncIterator[None]:
    """Translate errors as ``translate_store_errors``, for MongoDB only; in time also for many requests at once.

    While MongoDB is unavailable each of motor's few threads waits for it, and requests without a thread would wait for
    two timeouts.
    """
    try:
        with reported():
            async with asyncio.timeout(within(MONGO_ANSWER_SECONDS)):
                yield
    except TimeoutError as error:
        raise (store_down if _is_down(mongo) else store_slow)("MongoDB") from error


def _is_down(mongo: Any) -> bool:
    """Return whether connections to MongoDB fail; the client searches for a server until the timeout either way."""
    topology = mongo.client.topology_description
    errors = [server.error for server in topology.server_descriptions().values()]
    return not topology.has_known_servers and any(error is not None and not _timed_out(error) for error in errors)


def _timed_out(error: Exception) -> bool:
    """Return whether the server was slow. Server selection reaches its timeout also if connections are refused."""
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
        address = urlsplit(url).netloc.rpartition("@")[2] or urlsplit(url).path
        reason = " ".join(str(error).split())[:200] or "no answer in time"
        raise StoreDownError(f"{name} at {address} cannot be used: {reason}") from error
