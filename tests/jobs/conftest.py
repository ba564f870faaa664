"""Fixtures for jobs.

worker      one real worker process for the tests of this folder, on the stores of ``stack``; no injected faults
runner      runs programs in one tier of the sandbox, in a process of its own; each of its tests runs once for every
            tier that this machine has, as root and as somebody else
own_runner  the same, for one test alone, which may kill it
"""

import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from server.devstack.stack import Stack
from server.jobs import cgroups, tiers
from tests.conftest import TEST_SETTINGS
from tests.jobs.runner import Runner
from tests.processes import Processes, Worker

SOMEBODY = 20_000 + os.getpid() % 40_000  # whose processes, and limits, are of this run alone
TIERS = [tier for tier in tiers.TIERS if not tier.cgroup or cgroups.find()]  # few machines have that one
EVERYWHERE = [f"{tier.name} as {user}" for tier in TIERS for user in tier.users]
HOW_TO_HAVE_IT = {"bwrap": "apt-get install bubblewrap, and user namespaces"}


@pytest.fixture(scope="session")
def worker(stack: Stack, database_url: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Worker]:
    with Processes(TEST_SETTINGS | stack.environment, tmp_path_factory.mktemp("worker")) as running:
        yield running.worker().ready()


@pytest.fixture(scope="module", params=EVERYWHERE)
def runner(request: pytest.FixtureRequest) -> Iterator[Runner]:
    yield from running(request.param)


@pytest.fixture(params=EVERYWHERE)
def own_runner(request: pytest.FixtureRequest) -> Iterator[Runner]:
    yield from running(request.param)


def running(where: str) -> Iterator[Runner]:
    tier, _, user = where.partition(" as ")
    if user == tiers.ROOT and os.geteuid() != 0:
        pytest.skip("the tests are not run as root")
    uid = SOMEBODY if user == tiers.SOMEBODY and os.geteuid() == 0 else os.geteuid()
    # Not in pytest's directories, which are closed to other users.
    folder = Path(tempfile.mkdtemp(prefix="runner-"))
    folder.chmod(0o711)
    os.chown(folder, uid, -1)
    started = Runner(tier, uid, folder)
    try:
        if started.tier != tier:
            pytest.skip(f"this machine does not hold {tier}: it takes {HOW_TO_HAVE_IT.get(tier, 'a kernel with it')}")
        yield started
    finally:
        started.close()
        shutil.rmtree(folder, ignore_errors=True)
