"""The Redis pub/sub subscriber of this process: one connection, subscribed to the channels with a listener here.

A listener learns of every interruption, so it never takes a message after a gap for the next one in order:
``on_disconnect`` is called when the connection is lost, and ``resync`` once the channel is subscribed again.
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

from server.errors import ServiceError, Unavailable, store_timed_out, store_unreachable

log = structlog.get_logger()

SUBSCRIBE_TIMEOUT_SECONDS = 2.0
PING_INTERVAL_SECONDS = 2.0  # a connection without a reply until the next ping is lost
MIN_BACKOFF_SECONDS = 0.1
MAX_BACKOFF_SECONDS = 1.0
MAX_CONCURRENT_RESYNCS = 32
MAX_READ_SLICE_SECONDS = 0.005  # after this a burst of messages yields to the sockets


class ChannelListener(Protocol):
    """A receiver of the messages of one channel."""

    def deliver(self, origin: str, kind: str, payload: bytes) -> None:
        """Receive one message, in the order of Redis; ``origin`` and ``kind`` are as they were published."""

    def on_disconnect(self) -> None:
        """Handle the loss of the subscription: messages may be missed from now on."""

    async def resync(self) -> None:
        """Catch up with the missed messages; the channel is subscribed again and its messages flow.

        It may raise if it cannot; the listener itself must retry.
        """


class Subscriber:
    """A subscriber with a permanent subscription to the control channel.

    ``control`` is the listener of ``channel``. ``recheck_all`` makes up for the messages that it missed.
    """

    def __init__(
        self, redis: Redis, *, channel: str, control: ChannelListener, recheck_all: Callable[[], Awaitable[None]]
    ) -> None:
        self.is_live = False
        """Whether messages flow, and ``recheck_all`` has made up for missed control messages."""
        self._last_error: Exception | None = None  # why the last connection ended
        self._pool: Any = redis.connection_pool
        self._control = channel.encode()
        self._recheck_all = recheck_all
        self._listeners: dict[bytes, ChannelListener] = {self._control: control}
        self._changed_channels: set[bytes] = set()
        self._requested: set[bytes] = set()
        self._unconfirmed: Counter[bytes] = Counter()
        self._confirmations: dict[bytes, asyncio.Future[None]] = {}
        self._changed = asyncio.Event()
        self._received = False
        self._backoff = MIN_BACKOFF_SECONDS

    async def subscribe(self, name: str, listener: ChannelListener) -> None:
        """Subscribe and wait for Redis to confirm: from then on no message is missed. One listener per channel.

        Raises:
            Unavailable: Redis did not confirm in time. The listener stays registered until ``unsubscribe``, and
                receives messages later.
        """
        channel = name.encode()
        self._listeners[channel] = listener
        self._mark_changed(channel)
        await self._wait_confirmed(channel)

    def unsubscribe(self, name: str, listener: ChannelListener) -> None:
        """End a subscription, unless the channel has another listener by now."""
        channel = name.encode()
        if self._listeners.get(channel) is listener:
            del self._listeners[channel]
            self._mark_changed(channel)
            self._resolve_confirmation(channel)

    async def resync(self, name: str, listener: ChannelListener) -> None:
        """Resync one listener; a failure is logged and does not interrupt the other listeners."""
        try:
            await self._wait_confirmed(name.encode())
            await listener.resync()
        except (RedisError, OSError, ServiceError) as error:
            log.warning("resync failed, will be retried", channel=name, error=str(error))
        except Exception:
            log.exception("resync failed", channel=name)

    async def listen(self) -> None:
        """Deliver messages until cancelled; reconnect with exponential backoff after each interruption."""
        while True:
            try:
                async with self._connect() as connection:
                    await self._serve(connection)
            except (RedisError, OSError, TimeoutError) as error:
                self._last_error = error
                log.warning("subscription lost", error=str(error), retry_in=self._backoff)
            finally:
                self._on_disconnect()
            await asyncio.sleep(self._backoff)
            self._backoff = min(self._backoff * 2, MAX_BACKOFF_SECONDS)

    @asynccontextmanager
    async def _connect(self) -> AsyncIterator[Any]:
        """Open a connection that is subscribed to the control channel, and recheck what it may have missed there."""
        # Not from the pool, which would hand out a connection again whose handshake was aborted.
        connection: Any = self._pool.make_connection()
        try:
            async with asyncio.timeout(SUBSCRIBE_TIMEOUT_SECONDS):
                await connection.connect()
                await connection.send_command("SUBSCRIBE", self._control, check_health=False)
                await connection.read_response(disable_decoding=True)
            await self._recheck_all()
            yield connection
        finally:
            await connection.disconnect(nowait=True)

    async def _serve(self, connection: Any) -> None:
        missed = [*self._listeners.items()]
        self._requested.add(self._control)
        self._mark_changed(*self._listeners)
        self._received = self.is_live = True
        await _until_one_fails(
            self._read(connection),
            self._send_subscriptions(connection),
            self._ping(connection),
            self._resync_all(missed),
        )

    async def _read(self, connection: Any) -> None:
        loop = asyncio.get_running_loop()
        yield_at = loop.time() + MAX_READ_SLICE_SECONDS
        while True:
            # redis-py's own PubSub is not used: it reconnects silently, and messages are lost.
            reply = await connection.read_response(disable_decoding=True, push_request=True)
            self._received = True
            if reply[0] == b"message":
                self._deliver(reply[1], reply[2])
            elif reply[0] == b"subscribe":
                self._confirm(reply[1])
            if loop.time() > yield_at:
                await asyncio.sleep(0)
                yield_at = loop.time() + MAX_READ_SLICE_SECONDS

    def _deliver(self, channel: bytes, data: bytes) -> None:
        listener = self._listeners.get(channel)
        if listener is not None:
            try:
                origin, kind, payload = data.split(b"\n", 2)
                listener.deliver(origin.decode(), kind.decode(), payload)
            except Exception:
                log.exception("message not delivered", channel=channel.decode())

    async def _send_subscriptions(self, connection: Any) -> None:
        """Subscribe and unsubscribe as channels gain and lose their listener: one command for all pending changes."""
        while True:
            await self._changed.wait()
            self._changed.clear()
            changed, self._changed_channels = self._changed_channels, set()
            new = [channel for channel in changed if channel in self._listeners and channel not in self._requested]
            old = [channel for channel in changed if channel not in self._listeners and channel in self._requested]
            self._requested.update(new)
            self._requested.difference_update(old)
            self._unconfirmed.update(new)
            await _command(connection, "SUBSCRIBE", *new)
            await _command(connection, "UNSUBSCRIBE", *old)

    async def _ping(self, connection: Any) -> None:
        while self._received:
            self._received = False
            await _command(connection, "PING", b"")
            await asyncio.sleep(PING_INTERVAL_SECONDS)
        raise RedisTimeoutError("Redis did not reply to a ping")

    async def _resync_all(self, missed: list[tuple[bytes, ChannelListener]]) -> None:
        slots = asyncio.Semaphore(MAX_CONCURRENT_RESYNCS)

        async def resync_one(channel: bytes, listener: ChannelListener) -> None:
            async with slots:
                if self._listeners.get(channel) is listener:
                    await self.resync(channel.decode(), listener)

        await asyncio.gather(*(resync_one(channel, listener) for channel, listener in missed))
        self._backoff = MIN_BACKOFF_SECONDS

    def _mark_changed(self, *channels: bytes) -> None:
        self._changed_channels.update(channels)
        self._changed.set()

    async def _wait_confirmed(self, channel: bytes) -> None:
        if channel in self._requested and not self._unconfirmed[channel]:
            return
        confirmed = self._confirmations.setdefault(channel, asyncio.get_running_loop().create_future())
        try:
            async with asyncio.timeout(SUBSCRIBE_TIMEOUT_SECONDS):
                await asyncio.shield(confirmed)
        except TimeoutError:
            raise self.unavailable_error() from None

    def unavailable_error(self) -> Unavailable:
        """Return the error for a missing confirmation: Redis is slow, or there is no connection to it."""
        is_slow = self.is_live or isinstance(self._last_error, RedisTimeoutError | TimeoutError)
        return (store_timed_out if is_slow else store_unreachable)("Redis")

    def _confirm(self, channel: bytes) -> None:
        self._unconfirmed[channel] -= 1
        if self._unconfirmed[channel] <= 0:
            del self._unconfirmed[channel]
            self._resolve_confirmation(channel)

    def _resolve_confirmation(self, channel: bytes) -> None:
        confirmed = self._confirmations.pop(channel, None)
        if confirmed is not None and not confirmed.done():
            confirmed.set_result(None)

    def _on_disconnect(self) -> None:
        self.is_live = False
        self._requested.clear()
        self._unconfirmed.clear()
        for listener in list(self._listeners.values()):
            listener.on_disconnect()


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
