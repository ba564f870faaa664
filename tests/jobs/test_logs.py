"""The output of a program: readable while it runs and from any position, and published live."""

import asyncio
import dataclasses
from collections.abc import AsyncIterator, Sequence
from typing import Any

import pytest

from server.jobs import output, store
from server.jobs.output import MAX_CHUNK_CHARACTERS, OutputWriter
from server.resources import connect
from server.settings import Settings
from tests.actors import Actor
from tests.jobs.requests import program_job, submit_job
from tests.timeouts import WAIT_TIMEOUT_SECONDS

pytestmark = pytest.mark.usefixtures("worker")
TALKS = """
import sys, time
for n in range(3):
    print("line", n, flush=True)
    time.sleep(0.4)
print("oh", file=sys.stderr)
"""


async def test_output_is_readable_while_the_program_runs(alice: Actor) -> None:
    job = (await submit_job(alice, program_job(TALKS)))["id"]
    pages, after, text = 0, "0", ""
    async with asyncio.timeout(WAIT_TIMEOUT_SECONDS):
        while True:
            page = await alice.get(f"/jobs/{job}/logs?after={after}")
            for item in page["items"]:
                assert item["offset"] == len(text)
                text += item["text"]
            pages += bool(page["items"])
            if page["complete"]:
                break
            after = page["nextCursor"]
            await asyncio.sleep(0.1)
    assert page["nextCursor"] is None
    assert text == "line 0\nline 1\nline 2\noh\n"
    assert pages > 1
    done = await alice.finished_job(job)
    assert (done["result"]["stdout"], done["result"]["stderr"]) == (text[:-3], "oh\n")


async def test_output_is_read_from_any_position_in_pages(alice: Actor) -> None:
    job = (
        await submit_job(
            alice, program_job("import sys\nprint('é' * 40000)\nsys.stdout.flush()\nprint('x', file=sys.stderr)")
        )
    )["id"]
    await alice.finished_job(job)
    whole = await alice.get(f"/jobs/{job}/logs")
    text = "".join(item["text"] for item in whole["items"])
    assert sorted(text) == sorted("é" * 40000 + "\nx\n")
    for after in (1, 16_384, 30_001, 40_002, len(text), len(text) + 5):
        page = await alice.get(f"/jobs/{job}/logs?after={after}")
        assert "".join(item["text"] for item in page["items"]) == text[after:]
        assert page["complete"]
    first = await alice.get(f"/jobs/{job}/logs?limit=1")
    assert (len(first["items"]), first["complete"]) == (1, False)
    second = await alice.get(f"/jobs/{job}/logs?limit=1&cursor={first['nextCursor']}")
    assert second["items"][0]["offset"] == len(first["items"][0]["text"])
    for bad in ("after=-1", "after=x", "limit=0"):
        assert (await alice.get(f"/jobs/{job}/logs?{bad}")).status == 422


@pytest.fixture
async def mongo(settings: Settings, isolated_stores: dict[str, str]) -> AsyncIterator[Any]:
    async with connect(dataclasses.replace(settings, **isolated_stores)) as stores:
        yield stores.mongo


def writer(mongo: Any, *, claim: int, start: int = 0, published: list[str] | None = None) -> OutputWriter:
    async def publish(chunks: Sequence[dict[str, Any]]) -> None:
        (published if published is not None else []).extend(chunk["text"] for chunk in chunks)

    return OutputWriter(mongo, job="job", claim=claim, start=start, on_stored=publish, clock=store.mongo_now)


async def write(to: OutputWriter, text: str) -> None:
    to.add("stdout", 0, text)
    await to.flush()


async def kept(mongo: Any) -> str:
    """Return the stored output; assert that it has no gaps and no overlaps."""
    items, _ = await output.read(mongo, job="job", after=0, limit=100)
    text = ""
    for item in items:
        assert item["offset"] == len(text)
        text += item["text"]
    return text


async def test_superseded_attempt_does_not_overwrite_its_successors_output(mongo: Any) -> None:
    published: list[str] = []
    zombie, successor = writer(mongo, claim=1), writer(mongo, claim=2, published=published)
    await write(zombie, "first of the zombie, ")
    await write(successor, "its successor, ")  # its offset is taken
    await write(zombie, "x" * 2 * MAX_CHUNK_CHARACTERS)
    await write(zombie, "nothing of this")
    await write(successor, "and all of it")
    assert await kept(mongo) == "first of the zombie, its successor, and all of it"
    assert published == ["its successor, ", "and all of it"]


async def test_superseded_attempt_stores_nothing_after_its_successor(mongo: Any) -> None:
    zombie, successor = writer(mongo, claim=1), writer(mongo, claim=2)
    await write(successor, "mine")
    await write(zombie, "x" * 2 * MAX_CHUNK_CHARACTERS)
    await write(successor, ", too")
    assert await kept(mongo) == "mine, too"


async def test_output_is_stored_once_after_a_lost_response(mongo: Any) -> None:
    published: list[str] = []
    await write(
        writer(mongo, claim=1), "x" * MAX_CHUNK_CHARACTERS
    )  # simulates a lost response: the same attempt and offsets
    await write(writer(mongo, claim=1, published=published), "x" * MAX_CHUNK_CHARACTERS + "y")
    assert await kept(mongo) == "x" * MAX_CHUNK_CHARACTERS + "y"
    assert published == ["x" * MAX_CHUNK_CHARACTERS, "y"]


async def test_output_beyond_the_limit_ends_with_a_truncation_marker(mongo: Any) -> None:
    start = output.MAX_JOB_CHARACTERS - 1000
    full = writer(mongo, claim=1, start=start)
    for text in ("x" * 900, "y" * 5000, "z"):
        await write(full, text)
    items, end = await output.read(mongo, job="job", after=start, limit=10)
    room = 100 - len(output.TRUNCATION_MARKER)
    assert "".join(item["text"] for item in items) == "x" * 900 + "y" * room + output.TRUNCATION_MARKER
    assert end == output.MAX_JOB_CHARACTERS


async def test_logs_are_hidden_from_users_without_access(alice: Actor, bob: Actor) -> None:
    job = (await submit_job(alice))["id"]
    assert (await bob.get(f"/jobs/{job}/logs")).status == 404
