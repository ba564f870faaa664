"""Heavy work on documents, in a child process: pycrdt holds the GIL, and the loop would stand still meanwhile.

Light work is done at once where it is asked for. A child that crashes harms nobody else.
"""

import asyncio
import pickle
import sys
from collections.abc import Callable
from typing import Any, TypeVar

import structlog

from server.documents import updates
from server.errors import ServiceError, TooLarge, ValidationFailed

log = structlog.get_logger()

LIGHT_BYTES = 256 << 10  # a few milliseconds
HEAVY_AT_ONCE = 2  # children of this process
HEAVY_SECONDS = 30.0
T = TypeVar("T")


class Workshop:
    def __init__(self) -> None:
        self._slots = asyncio.Semaphore(HEAVY_AT_ONCE)

    async def do(self, work: Callable[..., T], *arguments: Any, size: int) -> T:
        """``work`` is a function of ``updates``; ``size`` is how many bytes it works on.

        Raises:
            TooLarge: it took too long.
            ServiceError: the child died.
        """
        if size <= LIGHT_BYTES:
            return work(*arguments)
        return await self._apart(work, *arguments)

    async def taste(self, state: bytes, update: bytes) -> None:
        """Apply an update where it harms nobody: there are such as crash pycrdt, process and all.

        Raises:
            ValidationFailed: it does.
        """
        try:
            await self._apart(updates.taste, state, update)
        except ServiceError as error:
            raise ValidationFailed("The update is malformed, or does not fit the document") from error

    async def _apart(self, work: Callable[..., T], *arguments: Any) -> T:
        async with self._slots:
            made: T = await self._in_a_child(work.__name__, arguments)
            return made

    async def _in_a_child(self, name: str, arguments: tuple[Any, ...]) -> Any:
        child = await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            "server.documents.workshop",
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
        )
        try:
            async with asyncio.timeout(HEAVY_SECONDS):
                made, _ = await child.communicate(pickle.dumps((name, arguments)))
        except TimeoutError:
            raise TooLarge("The document is too large for this") from None
        finally:
            if child.returncode is None:
                child.kill()
                await child.wait()
        if child.returncode != 0:
            log.warning("a child failed", work=name, status=child.returncode)
            raise ServiceError("The document cannot be worked on")
        return pickle.loads(made)  # noqa: S301 - written by our own child


def main() -> None:
    name, arguments = pickle.load(sys.stdin.buffer)  # noqa: S301 - written by our own parent
    pickle.dump(getattr(updates, name)(*arguments), sys.stdout.buffer)


if __name__ == "__main__":
    main()
