"""What every socket shares: frames, rooms, presence, and the way of an event from one process to all.

Passes through: ``endpoint`` reads frames and dispatches them through a table; ``channels`` tells others,
and ``presence`` who comes and goes; ``hub`` delivers what Redis brings. Knows no feature: ``app.py`` hands in the
tables, and who authenticates and authorizes.
"""
