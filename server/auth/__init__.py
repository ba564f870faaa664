"""Authentication: accounts, passwords, sessions and tokens.

Register, login, refresh, logout and the profile pass through here. This package identifies the caller (``guard``). It
never decides what a caller may do: ``projects.access`` alone decides that.
"""
