"""Projects, their members and invitations, and access control.

Requests about projects, collaborators and invitations pass through here, and every access check of the other packages:
``access`` is the only module that decides who may do what. This package never identifies a caller (``auth`` does), and
never sends to sockets itself: it publishes through ``realtime.channels``.
"""
