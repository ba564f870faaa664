"""Print one part of MONGODB_URI.

- ``uri``: the whole address
- ``database``: the name of the database
- ``server``: the address without the database, so that mongorestore takes an archive of another database
- ``collections``: the number of collections in the database; needs PyMongo, a dependency of the service
"""

import os
import sys
from urllib.parse import parse_qsl, urlencode, urlsplit, urlunsplit


def database(uri: str) -> str:
    return urlsplit(uri).path.lstrip("/")


def server(uri: str) -> str:
    """Return the address without the database.

    The database is also the default of ``authSource``, so the result sets ``authSource`` for a user.
    """
    parts = urlsplit(uri)
    options = dict(parse_qsl(parts.query))
    if parts.username:
        options.setdefault("authSource", database(uri) or "admin")
    return urlunsplit(parts._replace(path="/", query=urlencode(options)))


def collections(uri: str) -> int:
    from pymongo import MongoClient

    with MongoClient(uri, serverSelectionTimeoutMS=5000) as client:
        return len(client.get_default_database().list_collection_names())


if __name__ == "__main__":
    part = {"uri": str, "database": database, "server": server, "collections": collections}[sys.argv[1]]
    print(part(os.environ["MONGODB_URI"]))
