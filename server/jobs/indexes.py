"""The indexes of the MongoDB collections of jobs."""

from typing import Any

import pymongo

from server.jobs import artifacts, output, store

INDEX_BUILD_TIMEOUT_SECONDS = 600  # for a new version's index over many records


async def create_all(mongo: Any) -> None:
    """Create the indexes; safe to call at every start."""
    with pymongo.timeout(INDEX_BUILD_TIMEOUT_SECONDS):
        await store.create_indexes(mongo)
        await output.create_indexes(mongo)
        await artifacts.create_indexes(mongo)
