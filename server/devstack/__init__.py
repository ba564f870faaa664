"""Real stores out of pip wheels, for development and tests: PostgreSQL, Valkey and a MongoDB-compatible server.

Started as child processes on loopback ports under one data directory; never part of a deployment. Nothing of
the product knows that they are embedded: it gets their addresses.
"""
