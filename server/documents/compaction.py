"""Logs are kept short: merged into a snapshot in the background, while others append.

Nothing is locked while it is worked out, however long that takes: a snapshot is kept only where the one that it
builds on is still there, so of two processes that do it at once one has worked in vain.
"""

from server.documents import store, updates, wire
from server.documents.logs import Log
from server.documents.workshop import Workshop
from server.postgres import Database, Executor

MOST_TEXT_BYTES = 16 << 20  # of versions that users can name, worked out at once
INSTEAD = "\ufffd"  # of NUL, which PostgreSQL's text does not know, and Yjs does


async def compact(db: Database, workshop: Workshop, log: Log, *, grace_seconds: float) -> bool:
    """Merge a log into a snapshot; whether it was done. Not all of it where too many of its versions have names.

    For ``grace_seconds`` updates stay in the log all the same. Before they go, the texts of the versions that users
    can name are kept.

    Raises:
        Unavailable, TooLarge: PostgreSQL is away; it took too long.
    """
    log, named = _at_once(log, await _unkept(db, log))
    tail = [(row["version"], row["data"]) for row in log.tail]
    state, texts = await workshop.do(updates.compact, log.state, tail, named)
    for version, text in texts.items():
        await store.keep_text(db, document=log.document, version=version, text=text.replace(wire.NUL, INSTEAD))

    async def keep(transaction: Executor) -> bool:
        # From here on, until the commit, nothing gets a name.
        if not await store.lock_document(transaction, document=log.document, kept_version=log.kept_version):
            return False
        if await _unkept(transaction, log):
            return False
        await store.keep_snapshot(transaction, document=log.document, version=log.version, state=state)
        return True

    if not await db.transact(keep):
        return False
    await store.shorten_log(db, document=log.document, version=log.version, grace_seconds=grace_seconds)
    return True


async def _unkept(db: Executor, log: Log) -> list[int]:
    """The versions with a name whose texts go when the log does."""
    versions = [row["version"] for row in await store.list_unkept(db, document=log.document)]
    return [version for version in versions if log.kept_version <= version <= log.version]


def _at_once(log: Log, named: list[int]) -> tuple[Log, list[int]]:
    """So much of a log that the texts of its named versions fit into memory."""
    most = max(1, MOST_TEXT_BYTES // max(1, log.bytes))
    return (log, named) if len(named) <= most else (log.until(named[most - 1]), named[:most])
