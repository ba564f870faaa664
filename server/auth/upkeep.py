"""What must be done now and then, for as long as a process lives."""

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from functools import partial

import structlog

from server.auth import sessions
from server.auth.sessions import Issuer
from server.errors import ServiceError
from server.postgres import Executor

log = structlog.get_logger()

CATCH_UP_SECONDS = 0.5
FORGET_SECONDS = 3600.0
ERASE_SECONDS = 2.0


@dataclass(frozen=True)
class Chore:
    name: str
    do: Callable[[], Awaitable[None]]
    seconds: float = FORGET_SECONDS  # between two times


async def run(db: Executor, issuer: Issuer, *others: Chore) -> None:
    """What accounts need, and what others do."""
    await sessions.note_again(db, issuer)
    async with asyncio.TaskGroup() as tasks:
        for chore in (
            Chore("catch up with missed notes", issuer.blacklist.catch_up, CATCH_UP_SECONDS),
            Chore("erase salts of spent tokens", partial(sessions.erase_salts, db), ERASE_SECONDS),
            Chore("forget old sessions", partial(sessions.forget_old, db)),
            Chore("forget old networks", partial(sessions.forget_old_networks, db)),
            *others,
        ):
            tasks.create_task(keep_doing(chore))


async def keep_doing(chore: Chore) -> None:
    """Whatever happens to it: the next time may be better, and others go on. An outage is logged once."""
    is_put_off = False
    while True:
        try:
            await chore.do()
            is_put_off = False
        except ServiceError as error:
            if not is_put_off:
                log.warning("chore put off", chore=chore.name, error=error.detail)
            is_put_off = True
        except Exception:  # a door of its own: nobody stands behind it
            log.exception("chore failed", chore=chore.name)
        await asyncio.sleep(chore.seconds)
