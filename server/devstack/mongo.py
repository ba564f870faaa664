"""SecantusDB, which implements MongoDB's protocol: it runs as its own process and is never imported (GPL-2.0)."""

from typing import Any

import pymongo
from pymongo.errors import PyMongoError

from server.child import Child
from server.devstack.stores import DATABASE, HOST, Store, StoreConfig, script_path

OPTIONS = (
    *("--log-level", "WARNING"),
    *("--cache-size", "256M"),
    # Without it a killed server loses its last acknowledged writes (23 of 2,512); it costs a fifth of the throughput.
    "--sync-on-commit",
)


class Mongo(Store):
    """A server in place of MongoDB 7/8."""

    name = "MongoDB stand-in"

    def __init__(self, config: StoreConfig) -> None:
        self._data = config.data_dir / "mongo"
        self._config_file = config.data_dir / "mongo.toml"
        self.url = f"mongodb://{HOST}:{config.port}/{DATABASE}?directConnection=true"
        self.child = Child(
            self.name,
            [
                str(script_path("secantusd-py")),
                *("--config", str(self._config_file)),
                *("--host", HOST),
                *("--port", str(config.port)),
                *("--storage-path", str(self._data)),
                *OPTIONS,
            ],
            log=config.log_path("mongo"),
            lock=config.lock_path("mongo"),
        )

    def prepare(self) -> None:
        self._data.mkdir(mode=0o700, exist_ok=True)
        self._config_file.touch()  # an empty file: else it reads settings from the home directory or from /etc

    def is_ready(self) -> bool:
        try:
            with pymongo.MongoClient[dict[str, Any]](self.url, serverSelectionTimeoutMS=300) as client:
                client.admin.command("ping")
        except PyMongoError:
            return False
        return True
