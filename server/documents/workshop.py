"""Heavy and dangerous work on documents, in processes of its own: pycrdt holds the GIL, and the loop would stand
still meanwhile; and there are updates that crash it, or that it never comes back from.

Light work that is known to be harmless is done at once where it is asked for.
"""

import asyncio
import contextlib
import os
import pickle
import signal
import socket
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any, TypeVar
from uuid import UUID
from weakref import WeakValueDictionary

import structlog

from server.documents import updates
from server.documents.bench import CHUNK_BYTES, HEADER, MADE, REFUSED, SECONDS
from server.errors import ServiceError, TooLarge, Unavailable, ValidationFailed

log = structlog.get_logger()

# Benches of this process. Whoever waits for one kind of work does not wait for the others.
AT_ONCE = {"taste": 2, "compact": 1}
OTHERS_AT_ONCE = 2
MOST_LEFT_OUT = 3  # updates of a log
CRASHES = {
    signal.SIGSEGV,
    signal.SIGABRT,
    signal.SIGBUS,
    signal.SIGILL,
    signal.SIGFPE,
    signal.SIGTRAP,
    signal.SIGXCPU,
}
T = TypeVar("T")


class Failed(ServiceError):
    """A piece of work came to nothing; ``status`` is how its process ended."""

    def __init__(self, status: int) -> None:
        super().__init__("The document cannot be worked on")
        self.status = status


class Workshop:
    def __init__(self) -> None:
        self._others = _Benches(OTHERS_AT_ONCE)
        self._benches = {name: _Benches(most) for name, most in AT_ONCE.items()}
        self._tasters: WeakValueDictionary[UUID, asyncio.Lock] = WeakValueDictionary()

    async def do(self, work: Callable[..., T], *arguments: Any, on: Sequence[bytes] | None = None) -> T:
        """``work`` is a function of ``updates``; ``on`` is the log that it works on, where only that takes time.

        Raises:
            TooLarge: it took too long.
            Unavailable: there is no process for it.
            Failed: its process died.
        """
        if on is not None and updates.is_light(on):
            return work(*arguments)
        try:
            made: T = await self._apart(work, *arguments)
        except TimeoutError:
            raise TooLarge("Document is too large for this operation") from None
        except Failed as failure:
            log.warning("work on a document failed", work=work.__name__, status=failure.status)
            raise
        return made

    async def revive(self, log: Sequence[bytes]) -> bytes:
        """The state after a log. An update that crashes pycrdt there, though it was tasted elsewhere, is left out.

        Raises:
            TooLarge, Unavailable, Failed: as ``do``.
        """
        for _ in range(MOST_LEFT_OUT):
            try:
                return await self.do(updates.revive, log, on=log)
            except Failed:
                log = await self._without_the_first_that_fails(log)
        return await self.do(updates.revive, log)

    async def _without_the_first_that_fails(self, log: Sequence[bytes]) -> Sequence[bytes]:
        fine, fails = 0, len(log)
        while fails - fine > 1:
            middle = (fine + fails) // 2
            try:
                await self.do(updates.revive, log[:middle])
            except Failed:
                fails = middle
            else:
                fine = middle
        return [*log[: fails - 1], *log[fails:]]

    @contextlib.asynccontextmanager
    async def seat(self, user: UUID) -> AsyncIterator[None]:
        """For who has something to be tasted: one at a time of each user, the others wait for themselves."""
        async with self._tasters.setdefault(user, asyncio.Lock()):
            yield

    async def taste(self, state: bytes, update: bytes) -> bytes:
        """Apply an update where it harms nobody; the update as it is stored, NOTHING where that is known.

        Raises:
            ValidationFailed: it is malformed, does not fit, or crashes pycrdt.
            Unavailable: that cannot be told now.
        """
        try:
            return await self._apart(updates.taste, state, update)
        except TimeoutError:
            raise Unavailable("Validation of the update timed out") from None
        except Failed as failure:
            if failure.status == REFUSED or -failure.status in CRASHES:
                raise ValidationFailed("Update is malformed or does not fit the document") from None
            log.warning("an update could not be looked at", status=failure.status)
            raise Unavailable("Update cannot be validated now") from None

    def close(self) -> None:
        for benches in (self._others, *self._benches.values()):
            benches.close()

    async def _apart(self, work: Callable[..., T], *arguments: Any) -> T:
        benches = self._benches.get(work.__name__, self._others)
        request = pickle.dumps((work.__name__, arguments), protocol=pickle.HIGHEST_PROTOCOL)
        status, answer = await benches.do(request)
        if status != MADE:
            raise Failed(status)
        made: T = pickle.loads(answer)  # noqa: S301 - written by our own child
        return made


class _Benches:
    """So many at most, and no more than are needed at once."""

    def __init__(self, most: int) -> None:
        self._places = asyncio.Semaphore(most)
        self._free: list[_Bench] = []

    async def do(self, request: bytes) -> tuple[int, bytes]:
        async with self._places:
            bench = self._free.pop() if self._free else _Bench()
            try:
                async with asyncio.timeout(SECONDS):
                    answer = await bench.do(request)
            except BaseException:  # what it says later must not be taken for another's answer
                bench.close()
                raise
            self._free.append(bench)
            return answer

    def close(self) -> None:
        while self._free:
            self._free.pop().close()


class _Bench:
    def __init__(self) -> None:
        self._door, theirs = socket.socketpair()
        self._door.setblocking(False)
        self._process: subprocess.Popen[bytes] | None = None
        with theirs:
            try:
                self._process = subprocess.Popen(
                    [sys.executable, "-m", "server.documents.bench"],
                    stdin=theirs.fileno(),
                    stdout=subprocess.DEVNULL,
                    start_new_session=True,  # Ctrl-C is meant for us
                )
            except OSError as error:
                self.close()
                log.warning("no process to work in", error=str(error))
                raise Unavailable("Document cannot be processed now") from None

    async def do(self, request: bytes) -> tuple[int, bytes]:
        """
        Raises:
            Unavailable: it is gone.
        """
        loop = asyncio.get_running_loop()
        try:
            await loop.sock_sendall(self._door, HEADER.pack(0, len(request)))
            await loop.sock_sendall(self._door, request)
            status, length = HEADER.unpack(await self._receive(HEADER.size))
            return status, await self._receive(length)
        except OSError:
            raise Unavailable("Document cannot be processed now") from None

    async def _receive(self, size: int) -> bytes:
        loop, received = asyncio.get_running_loop(), bytearray()
        while len(received) < size:
            chunk = await loop.sock_recv(self._door, min(CHUNK_BYTES, size - len(received)))
            if not chunk:
                raise ConnectionResetError
            received += chunk
        return bytes(received)

    def close(self) -> None:
        """End it, and what it works on."""
        self._door.close()
        if self._process is not None and self._process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()

    def __del__(self) -> None:
        self.close()
