"""What a program prints can be read while it runs, from any position, and heard live."""

import asyncio

import pytest

from tests.actors import Actor
from tests.jobs.asking import ask, program

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
    async with asyncio.timeout(30):
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


async def test_strangers_read_no_logs(alice: Actor, bob: Actor) -> None:
    job = (await ask(alice))["id"]
    assert (await bob.get(f"/jobs/{job}/logs")).status == 404
