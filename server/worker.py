"""The worker process, put together on one page."""

import asyncio
import os
import socket
from typing import Any
from uuid import uuid4

import structlog
import uvloop
from saq import Worker
from saq.queue.redis import RedisQueue

from server import resources
from server.jobs import lifecycle, queue, store
from server.jobs.lifecycle import Bench
from server.jobs.sandbox import Sandbox
from server.jobs.types import JOB_TYPES
from server.settings import Settings
from server.signals import stop_signal

log = structlog.get_logger()

GRACE_SECONDS = 20


def run(settings: Settings) -> None:
    """One worker process, until SIGTERM or SIGINT."""
    uvloop.run(work(settings))


async def work(settings: Settings) -> None:
    """Open the stores, test the sandbox, run jobs, and stop gently when told to.

    Raises:
        StoreDownError: a store cannot be used.
    """
    stop = stop_signal()
    async with resources.connect(settings) as stores:
        await store.prepare(stores.mongo)
        bench = Bench(
            stores=stores,
            queue=queue.open_queue(stores.blocking_redis),
            sandbox=await Sandbox.detect(),
            types=JOB_TYPES,
            worker=f"{socket.gethostname()}-{os.getpid()}-{uuid4().hex[:6]}",
        )
        worker = JobWorker(bench.queue, bench, concurrency=settings.worker_concurrency)
        running = asyncio.ensure_future(worker.start())
        log.info(
            "worker ready", worker=bench.worker, sandbox=bench.sandbox.tier.name, languages=bench.sandbox.languages
        )
        await asyncio.wait({running, asyncio.ensure_future(stop.wait())}, return_when=asyncio.FIRST_COMPLETED)
        log.info("worker stopping")
        await worker.drain()
        await running
        await bench.sandbox.close()
    log.info("worker stopped")


class JobWorker(Worker[Any]):
    """SAQ's worker, which leaves the signals to us and stops taking messages before it waits for running ones."""

    SIGNALS = []  # noqa: RUF012 - SAQ's name and shape

    def __init__(self, messages: RedisQueue, bench: Bench, *, concurrency: int) -> None:
        self._bench = bench
        self._idle: set[asyncio.Task[Any]] = set()  # waiting for a message
        self._upkeep: list[asyncio.Task[None]] = []
        super().__init__(
            messages,
            functions=[("attempt", self._attempt)],
            concurrency=concurrency,
            before_process=self._busy,
            shutdown_grace_period_s=GRACE_SECONDS,
            cancellation_hard_deadline_s=5.0,
        )

    async def process(self) -> bool:
        task = asyncio.current_task()
        assert task is not None
        self._idle.add(task)
        try:
            return await super().process()
        finally:
            self._idle.discard(task)

    async def drain(self) -> None:
        """No new attempts; those that run may finish within the grace period, then they are handed back."""
        self.event.set()
        # Upkeep sleeps up to a minute between its turns, and SAQ would wait for it.
        for task in (*self._idle, *self._upkeep):
            task.cancel()

    async def upkeep(self) -> list[asyncio.Task[None]]:
        self._upkeep = await super().upkeep()
        return self._upkeep

    async def _busy(self, _: Any) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._idle.discard(task)

    async def _attempt(self, _: Any, *, job: str, claim: int) -> None:
        await lifecycle.attempt(self._bench, job=job, claim=claim)
