"""The collections of MongoDB that jobs need."""

from typing import Any

from server.jobs import artifacts, output, store


async def prepare(mongo: Any) -> None:
    """Create the indexes; safe to call at every start."""
    await store.prepare(mongo)
    await output.prepare(mongo)
    await artifacts.prepare(mongo)
