"""The indexes of job records: created at every start, and replaced if an older version defined them differently."""

from server.jobs import store
from server.resources import connect
from server.settings import Settings


async def test_index_of_an_older_version_is_replaced(settings: Settings) -> None:
    async with connect(settings) as stores:
        mongo = stores.mongo.client["indexes_of_old"]
        name, keys, _ = store._INDEXES[-1]
        await mongo.jobs.create_index([("status", 1)], name=name)
        await store.create_indexes(mongo)
        await store.create_indexes(mongo)
        indexes = await mongo.jobs.index_information()
        await stores.mongo.client.drop_database("indexes_of_old")
    assert [key for key, _ in indexes[name]["key"]] == [key for key, _ in keys]
    assert {name for name, _, _ in store._INDEXES} <= indexes.keys()
