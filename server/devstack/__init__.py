"""Real stores from pip wheels, for development and tests: PostgreSQL, Valkey and a MongoDB-compatible server.

The stores run as child processes on loopback ports, under one data directory. Servers and workers get their URLs and
secrets as environment variables, and never know that the stores are embedded; no deployment uses this package.
"""
