"""The indexes of the MongoDB collections of jobs."""

from typing import Any

import pymongo

from server.jobs import artifacts, output, store

BUILD_SECONDS = 600  # for a new version's index over many records


async def prepare(mongo: Any) -> None:
    """Create the indexes; safe to call at every start."""
    with pymongo.timeout(BUILD_SECONDS):
        await store.prepare(mongo)
        await output.prepare(mongo)
        await artifacts.prepare(mongo)
