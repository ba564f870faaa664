"""Workspaces: the rooms of a project in which people see each other live."""
