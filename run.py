#!/usr/bin/env python3
"""The one entry point: ``python run.py server | worker | dev | migrate | openapi | asyncapi``."""

from server.cli import main

if __name__ == "__main__":
    main()
