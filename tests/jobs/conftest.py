"""Fixtures for jobs.

worker  one real worker process for the tests of this folder, on the stores of ``stack``; no injected faults
"""

from collections.abc import Iterator

import pytest

from server.devstack.stack import Stack
from tests.conftest import TEST_SETTINGS
from tests.processes import Processes, Worker


@pytest.fixture(scope="session")
def worker(stack: Stack, database_url: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Worker]:
    with Processes(TEST_SETTINGS | stack.environment, tmp_path_factory.mktemp("worker")) as running:
        yield running.worker().ready()
