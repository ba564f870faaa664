"""What this process hears from Redis: one connection, subscribed to the channels that somebody here listens to.

Whatever interrupts it, nothing is delivered afterwards that a listener could mistake for the next message:
listeners are told of the interruption, and asked to catch up once their channel is subscribed again.
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
PING_SECONDS = 2.0  # one that does not answer until the next is gone
RECONNECT_SECONDS = 0.1
LONGEST_RECONNECT_SECONDS = 1.0
RESUMED_AT_ONCE = 32
SLICE_SECONDS = 0.005  # a burst of messages lets sockets be read after this


class Listener(Protocol):
    """Who hears a channel."""

    def deliver(self, origin: str, kind: str, payload: bytes) -> None:
        """One message, in the order in which Redis got them; ``origin`` and ``kind`` as they were published."""

    def interrupt(self) -> None:
        """The subscription is lost: messages may be missed from now on."""

    async def resume(self) -> None:
        """The channel is subscribed again, and its messages flow: catch up with what was missed.

        It may raise where it cannot, and has to try again by itself.
        """


class Subscriber:
    """``control`` hears its own channel always; ``vouch`` returns when what was missed of it cannot matter."""

    def __init__(self, redis: Redis, *, channel: str, control: Listener, vouch: Callable[[], Awaitable[None]]) -> None:
        self.serving = False
        """Whether messages flow, and what was missed of the control channel cannot matter any more."""
        self._lost_by: Exception | None = None  # the last connection
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
        """Returns when Redis has confirmed: from now on nothing is missed. One listener a channel.

        Raises:
            Unavailable: it has not in time. The listener is kept, and heard later, until ``unsubscribe``.
        """
        channel = name.encode()
        self._listeners[channel] = listener
        self._touch(channel)
        await self._confirmation(channel)

    def unsubscribe(self, name: str, listener: Listener) -> None:
        """Ends what ``subscribe`` began, unless another listens there by now."""
        channel = name.encode()
        if self._listeners.get(channel) is listener:
            del self._listeners[channel]
            self._touch(channel)
            self._end_wait(channel)

    async def resume(self, name: str, listener: Listener) -> None:
        """Let one catch up; that it cannot is logged, and no reason to interrupt all others."""
        try:
            await self._confirmation(name.encode())
            await listener.resume()
        except (RedisError, OSError, ServiceError) as error:
            log.warning("events not resumed yet", channel=name, error=str(error))
        except Exception:
            log.exception("events not resumed", channel=name)

    async def listen(self) -> None:
        """Deliver what Redis brings, for as long as the process lives; connects again when Redis was away."""
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
        """A connection that hears the control channel, and what it may have missed there has been looked up."""
        # Not one of the pool's: one whose handshake was given up would be handed out again.
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
            # The names of redis-py's own PubSub are not used: it connects again silently, and messages are lost.
            answer = await connection.read_response(disable_decoding=True, push_request=True)
            self._heard = True
            if answer[0] == b"message":
                self._deliver(answer[1], answer[2])
            elif answer[0] == b"subscribe":
                self._confirm(answer[1])
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
        """Subscriptions follow what is listened to, in batches: one command for all that changed meanwhile."""
        while True:
            await self._changed.wait()
            self._changed.clear()
            touched, self._touched = self._touched, set()
            new = [each for each in touched if each in self._listeners and each not in self._sent]
            old = [each for each in touched if each not in self._listeners and each in self._sent]
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
        raise RedisTimeoutError("Redis is silent")

    async def _resume(self, missed: list[tuple[bytes, Listener]]) -> None:
        slots = asyncio.Semaphore(RESUMED_AT_ONCE)

        async def resume(channel: bytes, listener: Listener) -> None:
            async with slots:
                if self._listeners.get(channel) is listener:
                    await self.resume(channel.decode(), listener)

        await asyncio.gather(*(resume(channel, listener) for channel, listener in missed))
        self._pause = RECONNECT_SECONDS

    def _touch(self, *channels: bytes) -> None:
        self._touched.update(channels)
        self._changed.set()

    async def _confirmation(self, channel: bytes) -> None:
        if channel in self._sent and not self._unconfirmed[channel]:
            return
        waiting = self._waiting.setdefault(channel, asyncio.get_running_loop().create_future())
        try:
            async with asyncio.timeout(SUBSCRIBE_SECONDS):
                await asyncio.shield(waiting)
        except TimeoutError:
            raise self.failure() from None

    def failure(self) -> Unavailable:
        """Return why Redis did not do something in time: it is slow, or there is no connection to it."""
        is_slow = self.serving or isinstance(self._lost_by, RedisTimeoutError | TimeoutError)
        return (store_slow if is_slow else store_down)("Redis")

    def _confirm(self, channel: bytes) -> None:
        self._unconfirmed[channel] -= 1
        if self._unconfirmed[channel] <= 0:
            del self._unconfirmed[channel]
            self._end_wait(channel)

    def _end_wait(self, channel: bytes) -> None:
        waiting = self._waiting.pop(channel, None)
        if waiting is not None and not waiting.done():
            waiting.set_result(None)

    def _interrupt(self) -> None:
        self.serving = False
        self._sent.clear()
        self._unconfirmed.clear()
        for listener in list(self._listeners.values()):
            listener.interrupt()


async def _until_one_fails(*coroutines: Coroutine[Any, Any, None]) -> None:
    """Raises what the first to fail raised. Before Python 3.13 a TaskGroup whose task fails forgets that it was
    cancelled at the same moment, and leaves its own task marked as cancelled when it was not."""
    tasks = [asyncio.ensure_future(each) for each in coroutines]
    try:
        done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_EXCEPTION)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
    for task in done:
        task.result()


async def _command(connection: Any, name: str, *arguments: bytes) -> None:
    if not connection.is_connected:  # else redis-py would connect again, without our subscriptions
        raise RedisConnectionError("Redis has hung up")
    if arguments:
        await connection.send_command(name, *arguments, check_health=False)
