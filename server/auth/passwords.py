"""Password hashing: bcrypt, in a small pool of threads that give way to the event loop.

A password is hashed in NFKC (UAX #15): keyboards send the same letters as different code points. Hashes from before
that are of the password as it was sent.
"""

import asyncio
import base64
import enum
import hashlib
import hmac
import os
import sys
import threading
import unicodedata
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Any, TypeVar

import bcrypt

from server.budget import uncounted
from server.errors import Unavailable

# bcrypt reads 72 bytes only; this public label keeps the digest from being any other's. Never change it.
LABEL = b"collaborative-workspace/password/v1"
# As sent: four times the characters of the longest password, as many as it has code points in any of its spellings.
# NFKC may make 18 of one (U+FDFA), and takes a time that grows faster than the text.
MAX_TYPED_CHARACTERS = 512
PATIENCE_SECONDS = 1.0  # for a thread; who would wait longer is told to come back
NICE = 10
T = TypeVar("T")


class Fit(enum.IntEnum):
    """How a password fits a hash; false where it does not."""

    NONE = 0
    OUTDATED = 1  # the hash is of another cost, or of the password as it was sent
    CURRENT = 2


def normalize(password: str) -> str:
    """Return the form that is hashed, up to 18 times as long."""
    return unicodedata.normalize("NFKC", password)


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
        hashed = await self._run(bcrypt.hashpw, _digest(normalize(password)), bcrypt.gensalt(self.rounds))
        return hashed.decode()

    async def verify(self, password: str, hashed: str | None) -> Fit:
        """Return how the password fits. None, the hash of an unknown address, costs the same and never fits.

        A password that is not in NFKC is also tried as sent, whatever the hash is: the time depends on what was typed,
        not on the account.

        Raises:
            Unavailable: as ``hash`` does.
        """
        against = self._nobody if hashed is None else hashed.encode()
        spellings = list(dict.fromkeys((normalize(password), password)))
        found = await self._run(_first_that_fits, map(_digest, spellings), against)
        if hashed is None or found is None:
            return Fit.NONE
        return Fit.CURRENT if found == 0 and self._has_this_cost(hashed) else Fit.OUTDATED

    def _has_this_cost(self, hashed: str) -> bool:
        """Whether it was made at this cost: ``$2b$12$…``."""
        return hashed.split("$")[2] == f"{self.rounds:02}"

    def close(self) -> None:
        self._pool.shutdown(wait=False, cancel_futures=True)

    async def _run(self, function: Callable[..., T], *args: Any) -> T:
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


def _first_that_fits(digests: Iterable[bytes], hashed: bytes) -> int | None:
    """Return the place of the first digest that fits the hash."""
    return next((place for place, digest in enumerate(digests) if bcrypt.checkpw(digest, hashed)), None)


def _digest(password: str) -> bytes:
    """44 bytes that depend on every byte of the password."""
    return base64.b64encode(hmac.digest(LABEL, password.encode(), hashlib.sha256))


def _give_way() -> None:
    # On Linux the priority is the thread's own: a storm of logins must not delay the loop. Elsewhere there is
    # no such thing, and an initializer that raises (nobody may become less nice) would break the pool.
    if sys.platform == "linux":
        with suppress(OSError):
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), max(NICE, os.nice(0)))
