"""Logs are kept short: merged into a snapshot in the background, while others append."""

from uuid import UUID

from server.documents import store, updates
from server.documents.logs import read_log
from server.documents.workshop import Workshop
from server.postgres import Database


async def compact(db: Database, workshop: Workshop, document: UUID, *, grace_seconds: float) -> bool:
    """Merge the log of a document into a snapshot, by one process at a time; whether it was done.

    For ``grace_seconds`` updates stay in the log all the same. Before they go, the texts of the versions that users
    can name are kept.

    Raises:
        NotFound, Unavailable: the document is gone; PostgreSQL is.
    """
    async with db.transaction() as transaction:
        if not await store.lock_compaction(transaction, document=document):
            return False
        log = await read_log(transaction, document)
        named = {row["version"] for row in await store.list_unkept(transaction, document=document)}
        named = {version for version in named if log.kept_version <= version <= log.version}
        tail = [(row["version"], row["data"]) for row in log.tail]
        state, texts = await workshop.do(updates.compact, log.state, tail, named, size=log.bytes)
        # From here on, until the commit, nothing gets a name.
        await store.lock_document(transaction, document=document)
        now_named = {row["version"] for row in await store.list_unkept(transaction, document=document)}
        if any(version <= log.version for version in now_named - named):
            return False
        await store.keep_texts(transaction, document=document, versions=list(texts), texts=list(texts.values()))
        await store.keep_snapshot(transaction, document=document, version=log.version, state=state)
        await store.shorten_log(transaction, document=document, version=log.version, grace_seconds=grace_seconds)
        return True
