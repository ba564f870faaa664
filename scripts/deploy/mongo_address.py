"""Tells parts of MONGODB_URI: ``uri``, all of it; ``database``, its name; ``server``, the address without the name, so
that another database's archive can go there; ``collections``, how many there are already (with PyMongo, which the
service brings).
"""

import os
import sys
from urllib.parse import parse_qsl, urlencode, urlsplit, urlunsplit


def database(uri: str) -> str:
    return urlsplit(uri).path.lstrip("/")


def server(uri: str) -> str:
    """Without the name, which is also where a user without ``authSource`` is looked up."""
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
    ask = {"uri": str, "database": database, "server": server, "collections": collections}[sys.argv[1]]
    print(ask(os.environ["MONGODB_URI"]))
