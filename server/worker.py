"""The composition root of the worker process."""

import asyncio
import os
import socket
from collections.abc import Collection, Sequence
from typing import Any
from uuid import uuid4

import structlog
from croniter import croniter
from saq import CronJob, Job, Worker
from saq.types import TimersDict

from server import loop, metrics, resources, tracing
from server.ending import GRACE_SECONDS, HAND_BACK_SECONDS
from server.jobs import collections, lifecycle, recovery, workers
from server.jobs.announcements import Announcements
from server.jobs.bell import Bell
from server.jobs.dispatch import Dispatcher
from server.jobs.files import Files
from server.jobs.leases import Leases
from server.jobs.lifecycle import Bench
from server.jobs.queue import InOrder, UpkeepLane
from server.jobs.sandbox import Sandbox
from server.jobs.types import JOB_TYPES
from server.jobs.workers import Report
from server.ops import watch, worker_endpoint
from server.realtime.channels import Channels
from server.realtime.history import History
from server.resources import Resources
from server.settings import Settings
from server.signals import stop_signal, tell_ready

log = structlog.get_logger()

RECONCILE_SECONDS = 60
CLEAN_UP_SECONDS = 300  # less than the interval of ten minutes
# The intervals of SAQ's own periodic tasks. Its abort is unused: jobs are cancelled by their records.
TIMERS = TimersDict(schedule=1, worker_info=10, sweep=15, abort=60)


def run(settings: Settings, queues: Sequence[str], *, supervised: bool = False, ready: int | None = None) -> int:
    """Run a worker process until SIGTERM or SIGINT; return its exit code.

    ``ready`` is a pipe to notify once the worker is ready.
    """
    return 0 if loop.run(work(settings, queues, supervised=supervised, ready=ready)) else 1


async def work(
    settings: Settings, queues: Sequence[str], *, supervised: bool = False, ready: int | None = None
) -> bool:
    """Open the stores, test the sandbox, run jobs, and shut down gracefully; return whether a signal requested it.

    Raises:
        StoreDownError: a store is unavailable.
    """
    stop = stop_signal(replaceable=supervised)
    async with (
        tracing.exported(settings, "worker"),
        resources.connect(settings) as stores,
        worker_endpoint.served(settings, stores),
    ):
        await collections.prepare(stores.mongo)
        bench = make_bench(settings, stores, await Sandbox.detect())
        report = Report(
            bench.worker, bench.sandbox.tier.name, bench.sandbox.languages, queues, settings.worker_concurrency
        )
        metrics.SANDBOX_LANGUAGES.labels(report.tier).set(len(report.languages))
        bell = Bell(stores.blocking_redis, on_cancel=bench.leases.drop)
        priority_queues = [bench.dispatcher.lanes[name] for name in queues]
        job_queue = InOrder(stores.redis, priority_queues, bell, has=[*JOB_TYPES, *report.languages])
        worker = JobWorker(job_queue, bench, concurrency=settings.worker_concurrency)
        background = [
            asyncio.ensure_future(task)
            for task in (
                bell.listen(),
                bench.leases.keep(),
                workers.keep_reporting(stores.redis, report),
                recovery.keep_admitting_due(bench, stores.redis),
                watch.look(stores.db),
                watch.ask_stores(stores),
                UpkeepWorker(UpkeepLane(stores.redis), bench).start(),
            )
        ]
        working = asyncio.ensure_future(worker.start())
        loop.settle()
        log.info("worker ready", worker=bench.worker, sandbox=report.tier, languages=report.languages, queues=queues)
        tell_ready(ready)
        _warn(settings)
        stopping = asyncio.ensure_future(stop.wait())
        await asyncio.wait({stopping, working, *background}, return_when=asyncio.FIRST_COMPLETED)
        requested = stop.is_set()
        log.info("worker stopping", told=requested)
        await workers.withdraw(stores.redis, bench.worker)
        await worker.drain(working)
        await _end([stopping, working, *worker.upkeep_tasks, *background])
        await bench.sandbox.close()
    log.info("worker stopped")
    return requested


def make_bench(settings: Settings, stores: Resources, sandbox: Sandbox) -> Bench:
    worker = f"{socket.gethostname()}-{os.getpid()}-{uuid4().hex[:6]}"
    history = History(stores.redis, most=settings.history_events, most_bytes=settings.history_bytes)
    return Bench(
        stores=stores,
        dispatcher=Dispatcher(stores.mongo, stores.redis, types=JOB_TYPES, slots=settings.jobs_per_user),
        announcements=Announcements(Channels(stores.redis, history)),
        leases=Leases(stores.mongo, worker=worker),
        sandbox=sandbox,
        files=Files(stores.db),
        types=JOB_TYPES,
        worker=worker,
    )


def _warn(settings: Settings) -> None:
    if settings.jobs_per_user >= settings.worker_concurrency:
        log.warning(
            "one user can fill a worker: JOBS_PER_USER should be below WORKER_CONCURRENCY",
            jobs_per_user=settings.jobs_per_user,
            worker_concurrency=settings.worker_concurrency,
        )


async def _end(tasks: Collection["asyncio.Future[Any]"]) -> None:
    await loop.end(tasks)
    for task in tasks:
        if not task.cancelled() and (error := task.exception()):
            log.error("worker's background failed", exc_info=error)


class JobWorker(Worker[Any]):
    """SAQ's worker, without its signal handlers; it stops taking messages before it waits for running attempts."""

    SIGNALS = []  # noqa: RUF012 - SAQ's name and shape

    def __init__(self, messages: InOrder, bench: Bench, *, concurrency: int) -> None:
        self._bench = bench
        self._messages = messages
        self.upkeep_tasks: list[asyncio.Task[None]] = []
        self._begun = asyncio.Event()
        super().__init__(
            messages,
            functions=[("attempt", self._attempt)],
            concurrency=concurrency,
            startup=self._begin,
            timers=TIMERS,
            shutdown_grace_period_s=GRACE_SECONDS + 2 * HAND_BACK_SECONDS,
        )

    async def drain(self, working: "asyncio.Future[None]") -> None:
        """Shut down gracefully: start no attempts, let running ones finish in the grace period, requeue the rest."""
        await self._begun.wait()  # SAQ creates its event in start()
        self.event.set()
        self._messages.close()
        if not await self._bench.leases.until_none(seconds=GRACE_SECONDS):
            self._bench.leases.stop_all()
        await asyncio.wait({working}, timeout=HAND_BACK_SECONDS)

    async def _begin(self, _: Any) -> None:
        self._begun.set()

    async def upkeep(self) -> list["asyncio.Task[None]"]:
        """Start SAQ's timers, but keep their tasks from SAQ: they sleep up to a minute, and SAQ would wait for them."""
        self.upkeep_tasks = await super().upkeep()
        return []

    async def _attempt(self, _: Any, *, job: str, claim: int, **__: Any) -> None:
        await lifecycle.attempt(self._bench, job=job, claim=claim)


class UpkeepWorker(Worker[Any]):
    """The worker of the reconciler and the clean-up, independent of the load of jobs.

    Each tick runs in one of all workers.
    """

    SIGNALS = []  # noqa: RUF012

    def __init__(self, messages: UpkeepLane, bench: Bench) -> None:
        self._bench = bench
        super().__init__(
            messages,
            functions=[],
            concurrency=2,  # the reconciler must not wait for a long clean-up
            cron_jobs=[
                CronJob(self.reconcile, cron="* * * * * */2", timeout=RECONCILE_SECONDS),
                CronJob(self.clean_up, cron="*/10 * * * *", timeout=CLEAN_UP_SECONDS),
            ],
            timers=TIMERS,
        )

    async def stop(self) -> None:
        """Cancel the running ticks, which the next ones repeat, and the sleeping timers.

        SAQ would not wait for either, and would warn that they have not finished.
        """
        self.event.set()
        await loop.end(self.tasks, seconds=HAND_BACK_SECONDS)
        await super().stop()

    async def reconcile(self, _: Any) -> None:
        await recovery.reconcile(self._bench)

    async def clean_up(self, _: Any) -> None:
        await recovery.clean_up(self._bench)

    async def schedule(self, lock: int = 1) -> None:
        """Schedule ticks as SAQ does, but each with its own key: a killed worker's tick must not block later ones."""
        for cron in self.cron_jobs:
            name, at = cron.function.__qualname__, int(croniter(cron.cron).get_next())
            tick = Job(name, key=f"{self.queue.name}:{name}:{at}", scheduled=at, timeout=cron.timeout or 0, ttl=-1)
            await self.queue.enqueue(tick)
        await self.queue.schedule(lock)
