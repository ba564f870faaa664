"""Password hashing: bcrypt, in a small pool of threads that give way to the event loop."""

import asyncio
import base64
import hashlib
import hmac
import os
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import TypeVar

import bcrypt

from server.budget import uncounted
from server.errors import Unavailable

# bcrypt reads 72 bytes only; this public label keeps the digest from being any other's. Never change it.
LABEL = b"collaborative-workspace/password/v1"
PATIENCE_SECONDS = 1.0  # for a thread; who would wait longer is told to come back
NICE = 10
T = TypeVar("T")


class Hasher:
    """Hashes at one cost; ``verify`` takes as long for an unknown user as for a known one."""

    def __init__(self, *, rounds: int) -> None:
        self.rounds = rounds
        threads = os.cpu_count() or 1
        self._pool = ThreadPoolExecutor(threads, "bcrypt", initializer=_give_way)
        self._free = asyncio.BoundedSemaphore(threads)
        self._nobody = bcrypt.gensalt(rounds) + b"." * 31  # of no password; to find that out takes as long as ever

    async def hash(self, password: str) -> str:
        """The hash to store.

        Raises:
            Unavailable: no thread was free in time.
        """
        hashed = await self._run(bcrypt.hashpw, _digest(password), bcrypt.gensalt(self.rounds))
        return hashed.decode()

    async def verify(self, password: str, hashed: str | None) -> bool:
        """Whether the password fits; None (nobody has that address) costs the same and fits never.

        Raises:
            Unavailable: as ``hash`` does.
        """
        against = self._nobody if hashed is None else hashed.encode()
        fits = await self._run(bcrypt.checkpw, _digest(password), against)
        return fits and hashed is not None

    def is_current(self, hashed: str) -> bool:
        """Whether it was made at this cost: ``$2b$12$…``."""
        return hashed.split("$")[2] == f"{self.rounds:02}"

    def close(self) -> None:
        self._pool.shutdown(wait=False, cancel_futures=True)

    async def _run(self, function: Callable[..., T], *args: bytes) -> T:
        with uncounted():
            try:
                async with asyncio.timeout(PATIENCE_SECONDS):
                    await self._free.acquire()
            except TimeoutError:
                raise Unavailable("Too many sign-ins at once") from None
            try:
                return await asyncio.get_running_loop().run_in_executor(self._pool, function, *args)
            finally:
                self._free.release()


def _digest(password: str) -> bytes:
    """44 bytes that depend on every byte of the password."""
    return base64.b64encode(hmac.digest(LABEL, password.encode(), hashlib.sha256))


def _give_way() -> None:
    # On Linux the priority is the thread's own: a storm of logins must not delay the loop. Elsewhere there is
    # no such thing, and an initializer that raises (nobody may become less nice) would break the pool.
    if sys.platform == "linux":
        with suppress(OSError):
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), max(NICE, os.nice(0)))
