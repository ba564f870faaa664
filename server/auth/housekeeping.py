"""Housekeeping: periodic tasks of a process, among them the account tasks."""

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from functools import partial

import structlog

from server.auth import sessions
from server.auth.sessions import AuthContext
from server.errors import ServiceError
from server.postgres import Executor

log = structlog.get_logger()

BLACKLIST_CHECK_INTERVAL_SECONDS = 0.5
CLEANUP_INTERVAL_SECONDS = 3600.0
SALT_ERASURE_INTERVAL_SECONDS = 2.0


@dataclass(frozen=True)
class PeriodicTask:
    name: str
    run: Callable[[], Awaitable[None]]
    interval_seconds: float = CLEANUP_INTERVAL_SECONDS  # between two runs


async def run_account_housekeeping(db: Executor, auth_context: AuthContext, *others: PeriodicTask) -> None:
    """Rebuild the blacklist, then run the account tasks and ``others`` periodically, until cancelled."""
    await sessions.rebuild_blacklist(db, auth_context)
    async with asyncio.TaskGroup() as tasks:
        for periodic_task in (
            PeriodicTask(
                "catch up with missed notes",
                auth_context.blacklist.reset_if_incomplete,
                BLACKLIST_CHECK_INTERVAL_SECONDS,
            ),
            PeriodicTask(
                "erase salts of spent tokens", partial(sessions.erase_salts, db), SALT_ERASURE_INTERVAL_SECONDS
            ),
            PeriodicTask("delete expired sessions", partial(sessions.delete_expired_sessions, db)),
            PeriodicTask("delete stale networks", partial(sessions.delete_stale_networks, db)),
            *others,
        ):
            tasks.create_task(run_periodically(periodic_task))


async def run_periodically(periodic_task: PeriodicTask) -> None:
    """Run a task periodically; a failure neither ends it nor stops other tasks. An outage is logged once."""
    is_put_off = False
    while True:
        try:
            await periodic_task.run()
            is_put_off = False
        except ServiceError as error:
            if not is_put_off:
                log.warning("periodic task deferred", task=periodic_task.name, error=error.detail)
            is_put_off = True
        except Exception:  # the outermost frame of this task: no caller handles it
            log.exception("periodic task failed", task=periodic_task.name)
        await asyncio.sleep(periodic_task.interval_seconds)
