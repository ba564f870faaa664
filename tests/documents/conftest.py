"""What tests of documents need beside the common fixtures."""

import pytest

from tests.actors import Actor


@pytest.fixture
async def workspace(alice: Actor, bob: Actor) -> str:
    return await alice.make_workspace(None, bob)
