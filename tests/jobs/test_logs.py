"""What a program prints can be read while it runs, from any position, and heard live."""

import asyncio
import dataclasses
from collections.abc import AsyncIterator, Sequence
from typing import Any

import pytest

from server.jobs import output, store
from server.jobs.output import CHUNK_CHARACTERS, Output
from server.resources import connect
from server.settings import Settings
from tests.actors import Actor
from tests.jobs.asking import ask, program
from tests.patience import PATIENCE_SECONDS

pytestmark = pytest.mark.usefixtures("worker")
TALKS = """
import sys, time
for n in range(3):
    print("line", n, flush=True)
    time.sleep(0.4)
print("oh", file=sys.stderr)
"""


async def test_the_output_so_far_is_there_while_the_program_runs(alice: Actor) -> None:
    job = (await ask(alice, program(TALKS)))["id"]
    pages, after, text = 0, "0", ""
    async with asyncio.timeout(PATIENCE_SECONDS):
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
        await ask(alice, program("import sys\nprint('é' * 40000)\nsys.stdout.flush()\nprint('x', file=sys.stderr)"))
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
async def mongo(settings: Settings, quiet: dict[str, str]) -> AsyncIterator[Any]:
    async with connect(dataclasses.replace(settings, **quiet)) as stores:
        yield stores.mongo


def writer(mongo: Any, *, claim: int, start: int = 0, told: list[str] | None = None) -> Output:
    async def tell(chunks: Sequence[dict[str, Any]]) -> None:
        (told if told is not None else []).extend(chunk["text"] for chunk in chunks)

    return Output(mongo, job="job", claim=claim, start=start, tell=tell, now=store.moment)


async def write(to: Output, text: str) -> None:
    to.add("stdout", 0, text)
    await to.flush()


async def kept(mongo: Any) -> str:
    """Without holes, and each place once."""
    items, _ = await output.read(mongo, job="job", after=0, limit=100)
    text = ""
    for item in items:
        assert item["offset"] == len(text)
        text += item["text"]
    return text


async def test_a_superseded_attempt_takes_no_place_from_its_successor(mongo: Any) -> None:
    told: list[str] = []
    zombie, successor = writer(mongo, claim=1), writer(mongo, claim=2, told=told)
    await write(zombie, "first of the zombie, ")
    await write(successor, "its successor, ")  # the place that it wanted is taken
    await write(zombie, "x" * 2 * CHUNK_CHARACTERS)
    await write(zombie, "nothing of this")
    await write(successor, "and all of it")
    assert await kept(mongo) == "first of the zombie, its successor, and all of it"
    assert told == ["its successor, ", "and all of it"]


async def test_a_successor_that_is_first_silences_the_superseded_attempt(mongo: Any) -> None:
    zombie, successor = writer(mongo, claim=1), writer(mongo, claim=2)
    await write(successor, "mine")
    await write(zombie, "x" * 2 * CHUNK_CHARACTERS)
    await write(successor, ", too")
    assert await kept(mongo) == "mine, too"


async def test_output_whose_answer_was_lost_is_kept_once(mongo: Any) -> None:
    told: list[str] = []
    await write(writer(mongo, claim=1), "x" * CHUNK_CHARACTERS)  # as if: the same attempt, and the same places
    await write(writer(mongo, claim=1, told=told), "x" * CHUNK_CHARACTERS + "y")
    assert await kept(mongo) == "x" * CHUNK_CHARACTERS + "y"
    assert told == ["x" * CHUNK_CHARACTERS, "y"]


async def test_what_is_beyond_the_bound_is_said_to_be_missing(mongo: Any) -> None:
    start = output.JOB_CHARACTERS - 1000
    full = writer(mongo, claim=1, start=start)
    for text in ("x" * 900, "y" * 5000, "z"):
        await write(full, text)
    items, end = await output.read(mongo, job="job", after=start, limit=10)
    room = 100 - len(output.MARKER)
    assert "".join(item["text"] for item in items) == "x" * 900 + "y" * room + output.MARKER
    assert end == output.JOB_CHARACTERS


async def test_strangers_read_no_logs(alice: Actor, bob: Actor) -> None:
    job = (await ask(alice))["id"]
    assert (await bob.get(f"/jobs/{job}/logs")).status == 404
