"""Timeouts of tests that wait for an expected event: they bound a hang, and measure nothing.

An event that is immediate on an idle machine may take seconds on a busy one. A test that must distinguish a mechanism
from its fallback (a notice from the next recheck) sets the fallback's interval far beyond these timeouts.
``scripts/bench`` measures how quick the product is.
"""

WAIT_TIMEOUT_SECONDS = 30.0
PROCESS_TIMEOUT_SECONDS = 100.0  # for a process to become ready, or to end; shorter than the timeout of a whole test
