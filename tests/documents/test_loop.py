"""No work on one document blocks the event loop."""

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from server.documents import updates, wire
from tests.actors import Actor
from tests.documents.editors import make_document
from tests.documents.test_yjs import compared, raw_socket

MOST_SECONDS = 5.0  # of CPU time; the work takes a tenth of it, and took a minute before it was optimized


@asynccontextmanager
async def watched_loop() -> AsyncIterator[None]:
    """Fail if the event loop, in which the server runs, blocks; CPU time of other processes does not count."""
    worst = 0.0

    async def watch() -> None:
        nonlocal worst
        while True:
            started = time.thread_time()
            await asyncio.sleep(0.01)
            worst = max(worst, time.thread_time() - started)

    watching = asyncio.ensure_future(watch())
    yield
    watching.cancel()
    assert worst < MOST_SECONDS


async def test_put_of_many_equal_lines_does_not_block_the_loop(alice: Actor, workspace: str) -> None:
    old, new = ("".join(f"{name}{n}\na\n" for n in range(500)) for name in "xy")
    document = await make_document(alice, workspace, content=old)
    async with watched_loop():
        assert (await alice.put(f"/documents/{document}/content", data=new, headers={"If-Match": "*"})).status == 200
    assert (await alice.get(f"/documents/{document}/content")).body == new


async def test_clients_that_resend_many_deletions_do_not_block_the_loop(alice: Actor, workspace: str) -> None:
    document = await make_document(alice, workspace)
    typed = updates.first("x" * 100_000)
    [client] = wire.state_vector(updates.load([typed])[0].get_state())
    ranges = b"".join(wire.number(2 * each) + b"\x01" for each in range(50_000))
    deleted = b"\x00\x01" + wire.number(client) + wire.number(50_000) + ranges
    socket = await raw_socket(alice, document)
    async with watched_loop():
        for update in (typed, deleted):
            await socket.send_bytes(wire.sync(wire.UPDATE, update))
        await compared(socket)
        for _ in range(5):
            await socket.send_bytes(wire.sync(wire.STEP_2, deleted))
        await compared(socket)
    assert (await alice.get(f"/documents/{document}"))["version"] == 3
    await socket.close()
