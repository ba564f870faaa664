"""Password hashing: bcrypt, in a small pool of threads that run at a lower priority than the event loop.

A password is hashed in NFKC (UAX #15), because keyboards send the same letters as different code points. Older hashes
are of the password as it was sent.
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

from server.deadline import paused
from server.errors import Unavailable

# bcrypt reads 72 bytes only, so it gets a digest. This public label keeps the digest apart from any other HMAC-SHA-256
# of the same password. Never change it: no stored hash would match.
HMAC_LABEL = b"collaborative-workspace/password/v1"
# Limit before normalization: four times the longest password, enough code points for any of its spellings. NFKC may
# turn one code point into 18 (U+FDFA), and takes a time that grows faster than the text.
MAX_RAW_PASSWORD_CHARACTERS = 512
HASH_WAIT_TIMEOUT_SECONDS = 1.0  # for a free thread; beyond it the request is rejected and the client may retry
THREAD_NICENESS = 10
T = TypeVar("T")


class PasswordMatch(enum.IntEnum):
    """The result of comparing a password with a hash; false for a mismatch."""

    MISMATCH = 0
    NEEDS_REHASH = 1  # the hash is of another cost, or of the password as it was sent
    MATCH = 2


def normalize(password: str) -> str:
    """Return the form of the password that is hashed, up to 18 times as long."""
    return unicodedata.normalize("NFKC", password)


class Hasher:
    """A password hasher of one cost; ``verify`` takes as long for an unknown user as for a known one."""

    def __init__(self, *, rounds: int) -> None:
        self.rounds = rounds
        threads = os.cpu_count() or 1
        self._pool = ThreadPoolExecutor(threads, "bcrypt", initializer=_lower_thread_priority)
        self._thread_slots = asyncio.BoundedSemaphore(threads)
        # No password matches this hash. A check against it costs the same time as a check of a real one.
        self._dummy_hash = bcrypt.gensalt(rounds) + b"." * 31

    async def hash(self, password: str) -> str:
        """Return the hash to store.

        Raises:
            Unavailable: no thread was free in time.
        """
        hashed = await self._run(bcrypt.hashpw, _digest(normalize(password)), bcrypt.gensalt(self.rounds))
        return hashed.decode()

    async def verify(self, password: str, hashed: str | None) -> PasswordMatch:
        """Compare the password with a hash. None (unknown address) takes the same time and never matches.

        A password that is not in NFKC is also tried as sent, for every hash: the time depends on the typed password,
        not on the account.

        Raises:
            Unavailable: as ``hash`` does.
        """
        expected = self._dummy_hash if hashed is None else hashed.encode()
        spellings = list(dict.fromkeys((normalize(password), password)))
        match_index = await self._run(_index_of_match, map(_digest, spellings), expected)
        if hashed is None or match_index is None:
            return PasswordMatch.MISMATCH
        return (
            PasswordMatch.MATCH if match_index == 0 and self._has_current_cost(hashed) else PasswordMatch.NEEDS_REHASH
        )

    def _has_current_cost(self, hashed: str) -> bool:
        """Return whether the hash has this hasher's cost: ``$2b$12$…``."""
        return hashed.split("$")[2] == f"{self.rounds:02}"

    def close(self) -> None:
        self._pool.shutdown(wait=False, cancel_futures=True)

    async def _run(self, function: Callable[..., T], *args: Any) -> T:
        with paused():
            try:
                async with asyncio.timeout(HASH_WAIT_TIMEOUT_SECONDS):
                    await self._thread_slots.acquire()
            except TimeoutError:
                raise Unavailable("Too many concurrent sign-ins") from None
            try:
                return await asyncio.get_running_loop().run_in_executor(self._pool, function, *args)
            finally:
                self._thread_slots.release()


def _index_of_match(digests: Iterable[bytes], hashed: bytes) -> int | None:
    """Return the index of the first digest that matches the hash, or None."""
    return next((index for index, digest in enumerate(digests) if bcrypt.checkpw(digest, hashed)), None)


def _digest(password: str) -> bytes:
    """Return 44 bytes that depend on every byte of the password."""
    return base64.b64encode(hmac.digest(HMAC_LABEL, password.encode(), hashlib.sha256))


def _lower_thread_priority() -> None:
    # On Linux each thread has its own priority: a burst of logins must not delay the event loop. Other systems have no
    # such priority. An initializer that raises (lowering the niceness is not permitted) would break the pool.
    if sys.platform == "linux":
        with suppress(OSError):
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), max(THREAD_NICENESS, os.nice(0)))
