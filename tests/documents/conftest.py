"""What tests of open documents need beside the common fixtures."""

import asyncio
from collections.abc import AsyncIterator

import pytest

from tests.actors import Actor


@pytest.fixture
async def hang_up(alice: Actor, bob: Actor, carol: Actor) -> AsyncIterator[None]:
    """Sockets are closed before their servers are, which would wait for them."""
    yield
    await asyncio.gather(*(socket.close() for actor in (alice, bob, carol) for socket in actor.sockets))


@pytest.fixture
async def workspace(alice: Actor, bob: Actor) -> str:
    return await alice.make_workspace(None, bob)
