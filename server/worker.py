"""The composition root of the worker process."""

import asyncio
import os
import socket
from collections.abc import Collection, Sequence
from typing import Any
from uuid import uuid4

import structlog
from croniter import croniter
from saq import CronJob, Worker
from saq import Job as SaqJob
from saq.types import TimersDict

from server import loop, metrics, resources, tracing
from server.jobs import indexes, lifecycle, recovery, worker_registry
from server.jobs.announcements import Announcements
from server.jobs.dispatch import Dispatcher
from server.jobs.leases import Leases
from server.jobs.lifecycle import WorkerContext
from server.jobs.notifier import JobNotifier
from server.jobs.queue import MaintenanceQueue, WeightedOrder
from server.jobs.sandbox import Sandbox
from server.jobs.types import JOB_TYPES
from server.jobs.worker_registry import WorkerHeartbeat
from server.jobs.workspace_files import WorkspaceFiles
from server.ops import sampling, worker_endpoint
from server.realtime.channels import Channels
from server.realtime.history import History
from server.resources import Resources
from server.settings import Settings
from server.shutdown import JOB_GRACE_SECONDS, REQUEUE_TIMEOUT_SECONDS
from server.signals import notify_ready, watch_stop_signals

log = structlog.get_logger()

RECONCILE_TIMEOUT_SECONDS = 60
CLEAN_UP_TIMEOUT_SECONDS = 300  # less than the interval of ten minutes
# The intervals of SAQ's own periodic tasks. Its abort is unused: jobs are cancelled by their records.
SAQ_TIMERS = TimersDict(schedule=1, worker_info=10, sweep=15, abort=60)


def run(settings: Settings, queues: Sequence[str], *, supervised: bool = False, ready: int | None = None) -> int:
    """Run a worker process until SIGTERM or SIGINT; return its exit code.

    ``ready`` is a pipe to notify once the worker is ready.
    """
    return 0 if loop.run(serve(settings, queues, supervised=supervised, ready=ready)) else 1


async def serve(
    settings: Settings, queues: Sequence[str], *, supervised: bool = False, ready: int | None = None
) -> bool:
    """Open the stores, test the sandbox, run jobs, and shut down gracefully; return whether a signal requested it.

    Raises:
        StoreDownError: a store is unavailable.
    """
    stop = watch_stop_signals(replaceable=supervised)
    async with (
        tracing.export_traces(settings, "worker"),
        resources.connect(settings) as stores,
        worker_endpoint.serve_endpoint(settings, stores),
    ):
        await indexes.create_all(stores.mongo)
        context = make_context(settings, stores, await Sandbox.detect())
        heartbeat = WorkerHeartbeat(
            context.worker, context.sandbox.tier.name, context.sandbox.languages, queues, settings.worker_concurrency
        )
        metrics.SANDBOX_LANGUAGES.labels(heartbeat.tier).set(len(heartbeat.languages))
        notifier = JobNotifier(stores.blocking_redis, on_cancel=context.leases.cancel)
        priority_queues = [context.dispatcher.queues[name] for name in queues]
        job_queue = WeightedOrder(
            stores.redis, priority_queues, notifier, capabilities=[*JOB_TYPES, *heartbeat.languages]
        )
        worker = JobWorker(job_queue, context, concurrency=settings.worker_concurrency)
        background = [
            asyncio.ensure_future(task)
            for task in (
                notifier.listen(),
                context.leases.renew_forever(),
                worker_registry.send_heartbeats_forever(stores.redis, heartbeat),
                recovery.admit_due_jobs_forever(context, stores.redis),
                sampling.sample(stores.db),
                sampling.sample_stores(stores),
                MaintenanceWorker(MaintenanceQueue(stores.redis), context).start(),
            )
        ]
        working = asyncio.ensure_future(worker.start())
        loop.tune_gc()
        log.info(
            "worker ready", worker=context.worker, sandbox=heartbeat.tier, languages=heartbeat.languages, queues=queues
        )
        notify_ready(ready)
        _warn_about_quota(settings)
        stopping = asyncio.ensure_future(stop.wait())
        await asyncio.wait({stopping, working, *background}, return_when=asyncio.FIRST_COMPLETED)
        requested = stop.is_set()
        log.info("worker stopping", requested=requested)
        await worker_registry.unregister(stores.redis, context.worker)
        await worker.drain(working)
        await _end_tasks([stopping, working, *worker.timer_tasks, *background])
        await context.sandbox.close()
    log.info("worker stopped")
    return requested


def make_context(settings: Settings, stores: Resources, sandbox: Sandbox) -> WorkerContext:
    worker = f"{socket.gethostname()}-{os.getpid()}-{uuid4().hex[:6]}"
    history = History(stores.redis, max_events=settings.history_events, max_bytes=settings.history_bytes)
    return WorkerContext(
        stores=stores,
        dispatcher=Dispatcher(stores.mongo, stores.redis, types=JOB_TYPES, slots=settings.jobs_per_user),
        announcements=Announcements(Channels(stores.redis, history)),
        leases=Leases(stores.mongo, worker=worker),
        sandbox=sandbox,
        files=WorkspaceFiles(stores.db),
        types=JOB_TYPES,
        worker=worker,
    )


def _warn_about_quota(settings: Settings) -> None:
    if settings.jobs_per_user >= settings.worker_concurrency:
        log.warning(
            "one user can fill a worker: JOBS_PER_USER should be below WORKER_CONCURRENCY",
            jobs_per_user=settings.jobs_per_user,
            worker_concurrency=settings.worker_concurrency,
        )


async def _end_tasks(tasks: Collection["asyncio.Future[Any]"]) -> None:
    await loop.cancel_tasks(tasks)
    for task in tasks:
        if not task.cancelled() and (error := task.exception()):
            log.error("worker background task failed", exc_info=error)


class JobWorker(Worker[Any]):
    """SAQ's worker, without its signal handlers; it stops taking messages before it waits for running attempts."""

    SIGNALS = []  # noqa: RUF012 - SAQ's name and shape

    def __init__(self, queue: WeightedOrder, context: WorkerContext, *, concurrency: int) -> None:
        self._context = context
        self._job_queue = queue
        self.timer_tasks: list[asyncio.Task[None]] = []
        self._started = asyncio.Event()
        super().__init__(
            queue,
            functions=[("attempt", self._attempt)],
            concurrency=concurrency,
            startup=self._on_startup,
            timers=SAQ_TIMERS,
            shutdown_grace_period_s=JOB_GRACE_SECONDS + 2 * REQUEUE_TIMEOUT_SECONDS,
        )

    async def drain(self, working: "asyncio.Future[None]") -> None:
        """Shut down gracefully: start no attempts, let running ones finish in the grace period, requeue the rest."""
        await self._started.wait()  # SAQ creates its event in start()
        self.event.set()
        self._job_queue.close()
        if not await self._context.leases.wait_idle(timeout=JOB_GRACE_SECONDS):
            self._context.leases.stop_all()
        await asyncio.wait({working}, timeout=REQUEUE_TIMEOUT_SECONDS)

    async def _on_startup(self, _: Any) -> None:
        self._started.set()

    async def upkeep(self) -> list["asyncio.Task[None]"]:
        """Start SAQ's timers, but keep their tasks from SAQ: they sleep up to a minute, and SAQ would wait for them."""
        self.timer_tasks = await super().upkeep()
        return []

    async def _attempt(self, _: Any, *, job: str, claim: int, **__: Any) -> None:
        await lifecycle.run_attempt(self._context, job=job, claim=claim)


class MaintenanceWorker(Worker[Any]):
    """The worker of the reconciler and the clean-up, which take no slot of the jobs.

    Each tick, one run of a cron job, runs in only one of all worker processes.
    """

    SIGNALS = []  # noqa: RUF012

    def __init__(self, queue: MaintenanceQueue, context: WorkerContext) -> None:
        self._context = context
        super().__init__(
            queue,
            functions=[],
            concurrency=2,  # the reconciler must not wait for a long clean-up
            cron_jobs=[
                CronJob(self.reconcile, cron="* * * * * */2", timeout=RECONCILE_TIMEOUT_SECONDS),
                CronJob(self.clean_up, cron="*/10 * * * *", timeout=CLEAN_UP_TIMEOUT_SECONDS),
            ],
            timers=SAQ_TIMERS,
        )

    async def stop(self) -> None:
        """Cancel the running ticks, which the next ones repeat, and the sleeping timers.

        SAQ would not wait for either, and would warn that they have not finished.
        """
        self.event.set()
        await loop.cancel_tasks(self.tasks, timeout=REQUEUE_TIMEOUT_SECONDS)
        await super().stop()

    async def reconcile(self, _: Any) -> None:
        await recovery.reconcile(self._context)

    async def clean_up(self, _: Any) -> None:
        await recovery.clean_up(self._context)

    # SAQ names both in Redis by this. It stays: workers of two versions share the queue during a rolling upgrade.
    reconcile.__qualname__ = "UpkeepWorker.reconcile"
    clean_up.__qualname__ = "UpkeepWorker.clean_up"

    async def schedule(self, lock: int = 1) -> None:
        """Schedule ticks as SAQ does, but each with its own key: a killed worker's tick must not block later ones."""
        for cron in self.cron_jobs:
            name, at = cron.function.__qualname__, int(croniter(cron.cron).get_next())
            tick = SaqJob(name, key=f"{self.queue.name}:{name}:{at}", scheduled=at, timeout=cron.timeout or 0, ttl=-1)
            await self.queue.enqueue(tick)
        await self.queue.schedule(lock)
