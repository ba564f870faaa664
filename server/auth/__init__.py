"""Who you are: accounts, passwords, sessions and tokens.

Passes through: register, login, refresh, logout, profile. Says who asks (``guard``), never what they may do:
that is decided in ``projects.access`` alone.
"""
