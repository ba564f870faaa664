"""Jobs: programs and long tasks, which the server accepts and workers run.

The package receives job requests over REST, stores a record per job in MongoDB, sends a message per attempt through
Redis, and publishes status, progress and output to clients. The record is the source of truth; a message only tells a
worker which attempt to claim, and is delivered at least once. A worker claims an attempt by a conditional write on the
record, and only the holder of that claim may write the outcome (the fence): a program may run more than once, but one
outcome is stored. The package never runs a user's program outside the sandbox.
"""
