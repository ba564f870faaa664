"""The process pool: work that crashes, hangs or is killed there fails with an error and affects no other caller."""

import asyncio
import os
import signal
from collections.abc import AsyncIterator
from pathlib import Path
from uuid import uuid4

import pytest
from pycrdt import Doc, Text

from server.documents import updates, wire
from server.documents.workshop import Failed, Workshop
from server.errors import Unavailable, ValidationFailed
from tests.documents.hostile import nested_types, nested_values


@pytest.fixture
async def workshop() -> AsyncIterator[Workshop]:
    workshop = Workshop()
    yield workshop
    workshop.close()


async def test_valid_update_is_returned_as_it_is_stored(workshop: Workshop) -> None:
    state, other = updates.first("Hello"), updates.first(", world")
    assert await workshop.taste(state, other) == other
    assert await workshop.taste(state, state) == wire.NOTHING


@pytest.mark.parametrize(
    "bomb", [nested_values(100_000), nested_types(100_000), b"\xff" * 100], ids=["values", "types", "malformed"]
)
async def test_update_that_exhausts_the_stack_is_invalid(workshop: Workshop, bomb: bytes) -> None:
    with pytest.raises(ValidationFailed):
        await workshop.taste(wire.NOTHING, bomb)
    assert await workshop.taste(wire.NOTHING, updates.first("fine")) != wire.NOTHING


async def test_killed_process_makes_the_validation_unavailable(workshop: Workshop) -> None:
    await workshop.taste(wire.NOTHING, updates.first("x"))
    large = updates.first("x" * 5_000_000)
    tasting = asyncio.ensure_future(workshop.taste(large, large))
    await asyncio.sleep(0)
    for child in Path(f"/proc/{os.getpid()}/task/{os.getpid()}/children").read_text().split():
        if b"server.documents.bench" in Path(f"/proc/{child}/cmdline").read_bytes():
            os.kill(int(child), signal.SIGKILL)
    with pytest.raises(Unavailable):
        await tasting
    assert await workshop.taste(wire.NOTHING, updates.first("fine")) != wire.NOTHING


async def test_timed_out_result_is_not_returned_to_a_later_caller(workshop: Workshop) -> None:
    large = updates.first("x" * 1_000_000)
    for _ in range(3):
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.01):
                await workshop.do(updates.text_of, [large])
    assert await workshop.do(updates.text_of, [updates.first("mine")]) == "mine"


async def test_log_that_crashes_pycrdt_is_read_without_the_crashing_update(workshop: Workshop) -> None:
    log = [nested_types(100_000), wire.everything({5: 1}), updates.first("typed")]
    with pytest.raises(Failed):
        await workshop.do(updates.revive, log)
    assert await workshop.revive(log) == await workshop.revive([log[0], log[2]])


async def test_user_has_only_one_validation_at_a_time(workshop: Workshop) -> None:
    mallory, bob = uuid4(), uuid4()
    async with workshop.seat(mallory), workshop.seat(bob):
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.05), workshop.seat(mallory):
                pass


async def test_light_typing_needs_no_process(workshop: Workshop) -> None:
    doc: Doc[Text] = Doc()
    text = doc.get("content", type=Text)
    text += "typed"
    assert updates.is_light([doc.get_update()])
    assert not updates.is_light([nested_values(3)])
