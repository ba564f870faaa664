"""Fixtures for jobs.

make_context  the context of a worker, in the test process: ``context = await make_context(run)`` has a job type TEST
              with this function; ``await create_record(context)`` creates such a job
worker        a real worker process for the tests of this folder, on the stores of ``stack``, without injected faults
runner        a process that runs programs in one tier of the sandbox; each of its tests runs once for every tier of
              this machine, as root and as an unprivileged user
own_runner    a runner for a single test, which may kill it
streams       a terminal, a pipe and a log file, in turn
exposed_runner  a runner for a single test, whose stdin, stdout and stderr are ``streams``
"""

import contextlib
import dataclasses
import os
import pty
import shutil
import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

import pytest
from marshmallow import Schema

from server import resources
from server import worker as worker_process
from server.devstack.stack import Stack
from server.jobs import cgroups, indexes, store, tiers
from server.jobs.attempt_context import AttemptContext
from server.jobs.dispatch import Dispatcher
from server.jobs.lifecycle import WorkerContext
from server.jobs.store import JobRecord
from server.jobs.table import JobType
from server.settings import Settings
from tests.conftest import TEST_SETTINGS
from tests.jobs.runner import Runner
from tests.processes import Processes, Worker

Run = Callable[[AttemptContext, dict[str, Any]], Awaitable[dict[str, Any]]]
MakeContext = Callable[..., Awaitable[WorkerContext]]
UNPRIVILEGED_UID = (
    20_000 + os.getpid() % 40_000
)  # only this run of the tests has processes of this user, and their limits
TIERS = [tier for tier in tiers.TIERS if not tier.cgroup or cgroups.find_delegated_group()]  # few machines have cgroups
TIERS_AND_USERS = [f"{tier.name} as {user}" for tier in TIERS for user in tier.users]
INSTALL_HINTS = {"bwrap": "apt-get install bubblewrap, and user namespaces"}


@dataclasses.dataclass
class Streams:
    """The file behind a worker's stdin, stdout and stderr, and its other side."""

    kind: str
    descriptor: int
    other_side: int

    def written(self) -> bytes:
        """Read what has been written since the last call."""
        os.set_blocking(self.other_side, False)
        with contextlib.suppress(BlockingIOError):
            return os.read(self.other_side, 1 << 16)
        return b""


@pytest.fixture(params=["terminal", "pipe", "file"])
def streams(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Streams]:
    if request.param == "terminal":
        other_side, descriptor = pty.openpty()
    elif request.param == "pipe":
        other_side, descriptor = os.pipe()
    else:
        log = tmp_path / "log"
        log.write_text("an honest line\n")
        descriptor = os.open(log, os.O_RDWR | os.O_APPEND)
        other_side = os.open(log, os.O_RDONLY)
    yield Streams(request.param, descriptor, other_side)
    os.close(descriptor)
    os.close(other_side)


@pytest.fixture
async def make_context(settings: Settings, isolated_stores: dict[str, str]) -> AsyncIterator[MakeContext]:
    async with AsyncExitStack() as stack:

        async def make(run: Run, *, timeout: float = 20, **override: str) -> WorkerContext:
            replaced = dataclasses.replace(settings, **(isolated_stores | override))
            stores = await stack.enter_async_context(resources.connect(replaced))
            await indexes.create_all(stores.mongo)
            types: Any = {"TEST": JobType("TEST", Schema(), run, timeout, lambda _: None, "")}  # type: ignore[arg-type]
            context = worker_process.make_context(replaced, stores, None)  # type: ignore[arg-type]
            dispatcher = Dispatcher(stores.mongo, stores.redis, types=types, slots=4)
            return dataclasses.replace(context, types=types, dispatcher=dispatcher)

        yield make


async def create_record(
    context: WorkerContext, *, user: UUID | None = None, type: str = "TEST", priority: int = 5
) -> JobRecord:
    """Create the record of a job, without a message."""
    job, _ = await store.create(
        context.stores.mongo,
        user=user or uuid4(),
        user_name="Ada",
        type=type,
        payload={},
        priority=priority,
        project=None,
        workspace=None,
        run_at=None,
        idempotency_key=None,
        body_hash="",
        slots=context.dispatcher.slots,
        traceparent=None,
        now=store.mongo_now(),
    )
    return job


@pytest.fixture(scope="session")
def worker(stack: Stack, database_url: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Worker]:
    with Processes(TEST_SETTINGS | stack.environment, tmp_path_factory.mktemp("worker")) as running:
        yield running.worker().ready()


@pytest.fixture(scope="module", params=TIERS_AND_USERS)
def runner(request: pytest.FixtureRequest) -> Iterator[Runner]:
    yield from start_runner(request.param)


@pytest.fixture(params=TIERS_AND_USERS)
def own_runner(request: pytest.FixtureRequest) -> Iterator[Runner]:
    yield from start_runner(request.param)


@pytest.fixture(params=TIERS_AND_USERS)
def exposed_runner(request: pytest.FixtureRequest, streams: Streams) -> Iterator[Runner]:
    yield from start_runner(request.param, streams=streams.descriptor)


def start_runner(tier_and_user: str, *, streams: int | None = None) -> Iterator[Runner]:
    tier, _, user = tier_and_user.partition(" as ")
    if user == tiers.ROOT and os.geteuid() != 0:
        pytest.skip("needs root")
    uid = UNPRIVILEGED_UID if user == tiers.UNPRIVILEGED and os.geteuid() == 0 else os.geteuid()
    # Not in pytest's directories, which other users cannot read.
    folder = Path(tempfile.mkdtemp(prefix="runner-"))
    folder.chmod(0o711)
    os.chown(folder, uid, -1)
    new_runner = Runner(tier, uid, folder, streams=streams)
    try:
        if new_runner.tier != tier:
            pytest.skip(f"this machine does not support {tier}: needs {INSTALL_HINTS.get(tier, 'a kernel with it')}")
        yield new_runner
    finally:
        new_runner.close()
        shutil.rmtree(folder, ignore_errors=True)
