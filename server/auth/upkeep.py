"""Housekeeping: periodic tasks of a process, among them the account tasks."""

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
    seconds: float = FORGET_SECONDS  # between two runs


async def run(db: Executor, issuer: Issuer, *others: Chore) -> None:
    """Rebuild the blacklist, then run the account tasks and ``others`` periodically, until cancelled."""
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
    """Run a task periodically; a failure neither ends it nor stops other tasks. An outage is logged once."""
    is_put_off = False
    while True:
        try:
            await chore.do()
            is_put_off = False
        except ServiceError as error:
            if not is_put_off:
                log.warning("chore put off", chore=chore.name, error=error.detail)
            is_put_off = True
        except Exception:  # the outermost frame of this task: no caller handles it
            log.exception("chore failed", chore=chore.name)
        await asyncio.sleep(chore.seconds)
