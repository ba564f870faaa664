"""How long tests wait for what must come: it bounds a hang, and measures nothing.

What comes at once on an idle machine may take seconds on a busy one. Where a bound is to tell a mechanism from what
would help in its place (a notice from the next recheck), the test puts that far beyond this patience. How quick the
product is, ``scripts/bench`` measures.
"""

PATIENCE_SECONDS = 30.0
START_SECONDS = 100.0  # for a process to be ready, or to end; less than a test may take as a whole
