"""Run a tool of PostgreSQL on the database of PGDATABASE, a postgresql:// address, without passing it as an argument.

Every user of the machine can read the arguments of a process. libpq takes a whole address as an argument only, so this
program passes its parts in libpq's environment variables.
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
    environment = {
        "PGHOST": unquote(parts.hostname or ""),
        "PGPORT": str(parts.port or ""),
        "PGUSER": unquote(parts.username or ""),
        "PGPASSWORD": unquote(parts.password or ""),
        "PGDATABASE": unquote(parts.path.lstrip("/")),
    }
    environment |= {OPTIONS[name]: value for name, value in parse_qsl(parts.query) if name in OPTIONS}
    return {name: value for name, value in environment.items() if value}


if __name__ == "__main__":
    inherited = {name: value for name, value in os.environ.items() if name != "PGDATABASE"}
    connection = variables(os.environ["PGDATABASE"])
    # Without --dbname, pg_restore writes to stdout; it reads no database name from the environment.
    command = [f"--dbname={connection['PGDATABASE']}" if word == "--dbname=" else word for word in sys.argv[1:]]
    os.execvpe(command[0], command, inherited | connection)
