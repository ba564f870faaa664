"""Runs a tool of PostgreSQL on the database of PGDATABASE, a postgresql:// address, with no part of it in arguments.

libpq reads addresses from arguments only, which every user of the machine can see; its variables take the parts.
"""

import os
import sys
from urllib.parse import parse_qsl, unquote, urlsplit

OPTIONS = {
    "sslmode": "PGSSLMODE",
    "sslrootcert": "PGSSLROOTCERT",
    "sslcert": "PGSSLCERT",
    "sslkey": "PGSSLKEY",
    "host": "PGHOST",
    "port": "PGPORT",
    "user": "PGUSER",
    "password": "PGPASSWORD",
}


def variables(url: str) -> dict[str, str]:
    parts = urlsplit(url)
    given = {
        "PGHOST": unquote(parts.hostname or ""),
        "PGPORT": str(parts.port or ""),
        "PGUSER": unquote(parts.username or ""),
        "PGPASSWORD": unquote(parts.password or ""),
        "PGDATABASE": unquote(parts.path.lstrip("/")),
    }
    given |= {OPTIONS[name]: value for name, value in parse_qsl(parts.query) if name in OPTIONS}
    return {name: value for name, value in given.items() if value}


if __name__ == "__main__":
    kept = {name: value for name, value in os.environ.items() if name != "PGDATABASE"}
    found = variables(os.environ["PGDATABASE"])
    # pg_restore writes to stdout without --dbname, and takes no name from the environment.
    command = [f"--dbname={found['PGDATABASE']}" if word == "--dbname=" else word for word in sys.argv[1:]]
    os.execvpe(command[0], command, kept | found)
