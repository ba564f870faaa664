"""Real stores from pip wheels, for development and tests: PostgreSQL, Valkey and a MongoDB-compatible server.

The stores run as child processes on loopback ports, under one data directory. Only their URLs pass from here to the
product, which never depends on this package; no deployment uses it.
"""
