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
from motor.motor_asyncio import AsyncIOMotorClient
from pymongo.errors import PyMongoError
from redis.asyncio import BlockingConnectionPool, Redis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import RedisError

from server import postgres
from server.errors import Unavailable
from server.pipelines import Pipelines
from server.settings import Settings

START_SECONDS = 3.0  # for each store at start: all three are named within 10 s
REDIS_SECONDS = 1.0
REDIS_CONNECTIONS = 50
MONGO_MILLISECONDS = 1500


class StoreDownError(Exception):
    """A store cannot be reached at start; the text is one line that names it."""


@dataclass(frozen=True)
class Resources:
    settings: Settings
    db: postgres.Database
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
        redis = redis_client(settings.redis_url)
        stack.push_async_callback(redis.aclose)
        await _started("Redis", settings.redis_url, ping(redis))
        pipelines = Pipelines(redis)
        stack.push_async_callback(pipelines.close)
        blocking = blocking_redis_client(settings.redis_url)
        stack.push_async_callback(blocking.aclose)
        client: Any = mongo_client(settings.mongodb_uri)
        stack.callback(client.close)
        await _started("MongoDB", settings.mongodb_uri, client.admin.command("ping"))
        yield Resources(
            settings=settings,
            db=db,
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
    return Redis.from_pool(pool)


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


def mongo_client(uri: str) -> Any:
    return AsyncIOMotorClient(
        uri,
        tz_aware=True,
        uuidRepresentation="standard",
        serverSelectionTimeoutMS=MONGO_MILLISECONDS,
        connectTimeoutMS=MONGO_MILLISECONDS,
        socketTimeoutMS=MONGO_MILLISECONDS,
        waitQueueTimeoutMS=MONGO_MILLISECONDS,
    )


@contextmanager
def reported() -> Iterator[None]:
    """Turns what the clients of Redis and MongoDB raise when these are away into our 503."""
    try:
        yield
    except RedisError as error:
        raise Unavailable("Redis is unavailable") from error
    except PyMongoError as error:
        raise Unavailable("MongoDB is unavailable") from error


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
