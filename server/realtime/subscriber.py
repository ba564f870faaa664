"""The Redis pub/sub subscriber of this process: one connection, subscribed to the channels with a listener here.

After an interruption a listener never mistakes a later message for the next one: it receives ``on_disconnect``, and
``resync`` once its channel is subscribed again.
"""

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from contextlib import asynccontextmanager
from typing import Any, Protocol

import structlog
from redis.asyncio import Redis
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import RedisError
from redis.exceptions import TimeoutError as RedisTimeoutError

from server.errors import ServiceError, Unavailable, store_down, store_slow

log = structlog.get_logger()

SUBSCRIBE_SECONDS = 2.0
PING_SECONDS = 2.0  # a connection without a reply until the next ping is lost
RECONNECT_SECONDS = 0.1
LONGEST_RECONNECT_SECONDS = 1.0
RESUMED_AT_ONCE = 32
SLICE_SECONDS = 0.005  # after this a burst of messages yields to the sockets


class Listener(Protocol):
    """A receiver of the messages of one channel."""

    def deliver(self, origin: str, kind: str, payload: bytes) -> None:
        """Receive one message, in the order of Redis; ``origin`` and ``kind`` are as they were published."""

    def interrupt(self) -> None:
        """Handle the loss of the subscription: messages may be missed from now on."""

    async def resume(self) -> None:
        """Catch up with the missed messages; the channel is subscribed again and its messages flow.

        It may raise if it cannot; the listener itself must retry.
        """


class Subscriber:
    """A subscriber with a permanent subscription to the control channel.

    ``control`` is the listener of ``channel``. ``recheck_all`` makes up for the messages that it missed.
    """

    def __init__(self, redis: Redis, *, channel: str, control: Listener, vouch: Callable[[], Awaitable[None]]) -> None:
        self.serving = False
        """Whether messages flow, and ``recheck_all`` has made up for missed control messages."""
        self._lost_by: Exception | None = None  # why the last connection ended
        self._pool: Any = redis.connection_pool
        self._control = channel.encode()
        self._vouch = vouch
        self._listeners: dict[bytes, Listener] = {self._control: control}
        self._touched: set[bytes] = set()
        self._sent: set[bytes] = set()
        self._unconfirmed: Counter[bytes] = Counter()
        self._waiting: dict[bytes, asyncio.Future[None]] = {}
        self._changed = asyncio.Event()
        self._heard = False
        self._pause = RECONNECT_SECONDS

    async def subscribe(self, name: str, listener: Listener) -> None:
        """Subscribe and wait for Redis to confirm: from then on no message is missed. One listener per channel.

        Raises:
            Unavailable: Redis did not confirm in time. The listener stays registered until ``unsubscribe``, and
                receives messages later.
        """
        channel = name.encode()
        self._listeners[channel] = listener
        self._touch(channel)
        await self._confirmation(channel)

    def unsubscribe(self, name: str, listener: Listener) -> None:
        """End a subscription, unless the channel has another listener by now."""
        channel = name.encode()
        if self._listeners.get(channel) is listener:
            del self._listeners[channel]
            self._touch(channel)
            self._end_wait(channel)

    async def resume(self, name: str, listener: Listener) -> None:
        """Resync one listener; a failure is logged and does not interrupt the other listeners."""
        try:
            await self._confirmation(name.encode())
            await listener.resume()
        except (RedisError, OSError, ServiceError) as error:
            log.warning("events not resumed yet", channel=name, error=str(error))
        except Exception:
            log.exception("events not resumed", channel=name)

    async def listen(self) -> None:
        """Deliver messages until cancelled; reconnect with exponential backoff after each interruption."""
        while True:
            try:
                async with self._connected() as connection:
                    await self._serve(connection)
            except (RedisError, OSError, TimeoutError) as error:
                self._lost_by = error
                log.warning("events interrupted", error=str(error), retry_in=self._pause)
            finally:
                self._interrupt()
            await asyncio.sleep(self._pause)
            self._pause = min(self._pause * 2, LONGEST_RECONNECT_SECONDS)

    @asynccontextmanager
    async def _connected(self) -> AsyncIterator[Any]:
        """Open a connection that is subscribed to the control channel, and recheck what it may have missed there."""
        # Not from the pool, which would hand out a connection again whose handshake was aborted.
        connection: Any = self._pool.make_connection()
        try:
            async with asyncio.timeout(SUBSCRIBE_SECONDS):
                await connection.connect()
                await connection.send_command("SUBSCRIBE", self._control, check_health=False)
                await connection.read_response(disable_decoding=True)
            await self._vouch()
            yield connection
        finally:
            await connection.disconnect(nowait=True)

    async def _serve(self, connection: Any) -> None:
        missed = [*self._listeners.items()]
        self._sent.add(self._control)
        self._touch(*self._listeners)
        self._heard = self.serving = True
        await _until_one_fails(
            self._read(connection), self._send(connection), self._ping(connection), self._resume(missed)
        )

    async def _read(self, connection: Any) -> None:
        loop = asyncio.get_running_loop()
        until = loop.time() + SLICE_SECONDS
        while True:
            # redis-py's own PubSub is not used: it reconnects silently, and messages are lost.
            reply = await connection.read_response(disable_decoding=True, push_request=True)
            self._heard = True
            if reply[0] == b"message":
                self._deliver(reply[1], reply[2])
            elif reply[0] == b"subscribe":
                self._confirm(reply[1])
            if loop.time() > until:
                await asyncio.sleep(0)
                until = loop.time() + SLICE_SECONDS

    def _deliver(self, channel: bytes, data: bytes) -> None:
        listener = self._listeners.get(channel)
        if listener is not None:
            try:
                origin, kind, payload = data.split(b"\n", 2)
                listener.deliver(origin.decode(), kind.decode(), payload)
            except Exception:
                log.exception("a message could not be delivered", channel=channel.decode())

    async def _send(self, connection: Any) -> None:
        """Keep the subscriptions equal to the listened channels, in batches: one command for all pending changes."""
        while True:
            await self._changed.wait()
            self._changed.clear()
            changed, self._touched = self._touched, set()
            new = [channel for channel in changed if channel in self._listeners and channel not in self._sent]
            old = [channel for channel in changed if channel not in self._listeners and channel in self._sent]
            self._sent.update(new)
            self._sent.difference_update(old)
            self._unconfirmed.update(new)
            await _command(connection, "SUBSCRIBE", *new)
            await _command(connection, "UNSUBSCRIBE", *old)

    async def _ping(self, connection: Any) -> None:
        while self._heard:
            self._heard = False
            await _command(connection, "PING", b"")
            await asyncio.sleep(PING_SECONDS)
        raise RedisTimeoutError("Redis did not reply to a ping")

    async def _resume(self, missed: list[tuple[bytes, Listener]]) -> None:
        slots = asyncio.Semaphore(RESUMED_AT_ONCE)

        async def resync_one(channel: bytes, listener: Listener) -> None:
            async with slots:
                if self._listeners.get(channel) is listener:
                    await self.resume(channel.decode(), listener)

        await asyncio.gather(*(resync_one(channel, listener) for channel, listener in missed))
        self._pause = RECONNECT_SECONDS

    def _touch(self, *channels: bytes) -> None:
        self._touched.update(channels)
        self._changed.set()

    async def _confirmation(self, channel: bytes) -> None:
        if channel in self._sent and not self._unconfirmed[channel]:
            return
        confirmed = self._waiting.setdefault(channel, asyncio.get_running_loop().create_future())
        try:
            async with asyncio.timeout(SUBSCRIBE_SECONDS):
                await asyncio.shield(confirmed)
        except TimeoutError:
            raise self.failure() from None

    def failure(self) -> Unavailable:
        """Return why Redis did not confirm in time: it is slow, or there is no connection to it."""
        is_slow = self.serving or isinstance(self._lost_by, RedisTimeoutError | TimeoutError)
        return (store_slow if is_slow else store_down)("Redis")

    def _confirm(self, channel: bytes) -> None:
        self._unconfirmed[channel] -= 1
        if self._unconfirmed[channel] <= 0:
            del self._unconfirmed[channel]
            self._end_wait(channel)

    def _end_wait(self, channel: bytes) -> None:
        confirmed = self._waiting.pop(channel, None)
        if confirmed is not None and not confirmed.done():
            confirmed.set_result(None)

    def _interrupt(self) -> None:
        self.serving = False
        self._sent.clear()
        self._unconfirmed.clear()
        for listener in list(self._listeners.values()):
            listener.interrupt()


async def _until_one_fails(*coroutines: Coroutine[Any, Any, None]) -> None:
    """Run the coroutines until one fails, cancel the others, and raise its error.

    No TaskGroup: before Python 3.13, if its task fails, it forgets a cancellation at the same moment, and leaves its
    own task marked as cancelled when it was not.
    """
    tasks = [asyncio.ensure_future(coroutine) for coroutine in coroutines]
    try:
        done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_EXCEPTION)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
    for task in done:
        task.result()


async def _command(connection: Any, name: str, *arguments: bytes) -> None:
    if not connection.is_connected:  # else redis-py would reconnect without the subscriptions
        raise RedisConnectionError("Redis closed the connection")
    if arguments:
        await connection.send_command(name, *arguments, check_health=False)
