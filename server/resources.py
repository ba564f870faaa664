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
from server.deadline import remaining
from server.errors import store_timed_out, store_unreachable
from server.pipelines import REDIS_TIMEOUT_SECONDS, Pipelines
from server.replicas import Replicas
from server.settings import Settings, StartError

CONNECT_TIMEOUT_SECONDS = 3.0  # for each store at start, so that all three are checked within 10 s
MAX_REDIS_CONNECTIONS = 50
MONGO_TIMEOUT_SECONDS = 1.5
MAX_MONGO_CONNECTIONS = 50
MONGO_REQUEST_TIMEOUT_SECONDS = 1.2  # of a request's call; shorter, because pymongo notices a timeout a little late


class StoreDownError(StartError):
    """A store cannot be reached at start; the text is one line that names it."""


@dataclass(frozen=True)
class Resources:
    settings: Settings
    db: postgres.Database
    replicas: Replicas  # of the same database, for reads that may lag
    redis: Redis
    pipelines: Pipelines  # the same Redis, for the commands of every request
    blocking_redis: Redis  # the same Redis, for connections that wait for messages
    mongo: Any  # AsyncIOMotorDatabase, which carries no types


@asynccontextmanager
async def connect(settings: Settings) -> AsyncIterator[Resources]:
    """Connect to all stores and check each once.

    Raises:
        StoreDownError: a store does not respond within 3 s.
    """
    async with AsyncExitStack() as stack:
        db = await _open_store("PostgreSQL", settings.database_url, postgres.connect(settings.database_url))
        stack.push_async_callback(db.close)
        read_replicas = await replicas.connect(stack, db, settings.database_replica_urls)
        redis = redis_client(settings.redis_url)
        stack.push_async_callback(redis.aclose)
        await _open_store("Redis", settings.redis_url, ping(redis))
        pipelines = Pipelines(redis)
        stack.push_async_callback(pipelines.close)
        blocking = blocking_redis_client(settings.redis_url)
        stack.push_async_callback(blocking.aclose)
        client: Any = await _open_store("MongoDB", settings.mongodb_uri, _open_mongo(stack, settings.mongodb_uri))
        yield Resources(
            settings=settings,
            db=db,
            replicas=read_replicas,
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
        max_connections=MAX_REDIS_CONNECTIONS,
        timeout=REDIS_TIMEOUT_SECONDS,
        socket_timeout=REDIS_TIMEOUT_SECONDS,
        socket_connect_timeout=REDIS_TIMEOUT_SECONDS,
        socket_keepalive=True,
        retry=Retry(NoBackoff(), 0),
    )
    return TimedRedis.from_pool(pool)


class TimedRedis(Redis):
    """A client whose calls each have one timeout for everything: a free connection, connecting, command and reply."""

    async def execute_command(self, *args: Any, **options: Any) -> Any:
        with _translate_timeout():
            async with asyncio.timeout(remaining(REDIS_TIMEOUT_SECONDS)):
                return await super().execute_command(*args, **options)  # type: ignore[no-untyped-call]

    def pipeline(self, transaction: bool = True, shard_hint: str | None = None) -> "TimedPipeline":
        return TimedPipeline(self.connection_pool, self.response_callbacks, transaction, shard_hint)


class TimedPipeline(Pipeline):
    async def execute(self, raise_on_error: bool = True) -> list[Any]:
        with _translate_timeout():
            async with asyncio.timeout(remaining(REDIS_TIMEOUT_SECONDS)):
                return await super().execute(raise_on_error)


@contextmanager
def _translate_timeout() -> Iterator[None]:
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
        socket_connect_timeout=REDIS_TIMEOUT_SECONDS,
        socket_keepalive=True,
        health_check_interval=5,
        retry=Retry(NoBackoff(), 0),
    )


async def ping(redis: Redis) -> None:
    await cast("Awaitable[bool]", redis.ping())  # its type is that of the synchronous client, too


async def _open_mongo(stack: AsyncExitStack, uri: str) -> Any:
    client = mongo_client(uri)
    stack.push_async_callback(asyncio.to_thread, _close_mongo, client)
    with pymongo.timeout(CONNECT_TIMEOUT_SECONDS):  # longer than the timeout of requests
        await client.admin.command("ping")
    return client


def mongo_client(uri: str) -> Any:
    milliseconds = int(MONGO_TIMEOUT_SECONDS * 1000)
    return AsyncIOMotorClient(
        uri,
        tz_aware=True,
        uuidRepresentation="standard",
        maxPoolSize=MAX_MONGO_CONNECTIONS,
        # For a call as a whole: with its retry, and with server selection.
        timeoutMS=milliseconds,
        serverSelectionTimeoutMS=milliseconds,
        connectTimeoutMS=milliseconds,
        waitQueueTimeoutMS=milliseconds,
    )


def _close_mongo(client: Any) -> None:
    """Close the client with a timeout: it ends its sessions on the server, and a hanging server does not respond."""
    with pymongo.timeout(MONGO_TIMEOUT_SECONDS):
        client.close()


@contextmanager
def translate_store_errors() -> Iterator[None]:
    """Translate errors of Redis and MongoDB to a 503 that says whether the store is down or slow.

    Calls of MongoDB inside the block also get the timeout of a request; those of Redis have one in ``TimedRedis``.
    """
    try:
        with pymongo.timeout(remaining(MONGO_REQUEST_TIMEOUT_SECONDS)):
            yield
    except RedisError as error:
        raise (store_timed_out if isinstance(error, RedisTimeoutError) else store_unreachable)("Redis") from error
    except PyMongoError as error:
        raise (store_timed_out if _timed_out(error) else store_unreachable)("MongoDB") from error


@asynccontextmanager
async def translate_mongo_errors(mongo: Any) -> AsyncIterator[None]:
    """Translate errors of MongoDB as ``translate_store_errors`` does, with a timeout that also holds under load.

    While MongoDB is unavailable each of motor's few threads waits for it. A request that first waits for a thread would
    take two timeouts.
    """
    try:
        with translate_store_errors():
            async with asyncio.timeout(remaining(MONGO_REQUEST_TIMEOUT_SECONDS)):
                yield
    except TimeoutError as error:
        raise (store_unreachable if _is_down(mongo) else store_timed_out)("MongoDB") from error


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


async def _open_store(name: str, url: str, opening: Awaitable[Any]) -> Any:
    try:
        async with asyncio.timeout(CONNECT_TIMEOUT_SECONDS):
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
