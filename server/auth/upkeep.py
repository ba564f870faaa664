"""What accounts need done in the background, for as long as a process lives."""

import asyncio

import structlog

from server.auth import sessions
from server.auth.blacklist import Blacklist
from server.errors import ServiceError
from server.postgres import Executor

log = structlog.get_logger()

FORGET_SECONDS = 3600.0


async def run(db: Executor, blacklist: Blacklist) -> None:
    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(blacklist.catch_up())
        tasks.create_task(_forget_old_sessions(db))


async def _forget_old_sessions(db: Executor) -> None:
    while True:
        try:
            await sessions.forget_old(db)
        except ServiceError as error:
            log.warning("old sessions kept", error=error.detail)
        await asyncio.sleep(FORGET_SECONDS)
