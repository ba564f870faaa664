#!/usr/bin/env python3
"""The entry point: ``python run.py server | worker | dev | migrate | openapi | asyncapi``."""

import sys

try:
    from server.cli import main
except ModuleNotFoundError as error:
    if error.name is None or error.name.partition(".")[0] == "server":
        raise
    sys.exit(
        f"error: {sys.executable} lacks the package {error.name}. "
        "Run scripts/dev once, which makes .venv; then run .venv/bin/python run.py"
    )

if __name__ == "__main__":
    main()
