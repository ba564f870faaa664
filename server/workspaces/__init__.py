"""Workspaces: the parts of a project in which members work together in real time.

REST requests about workspaces and the socket messages join, leave, file change and cursor update pass through here. The
package never decides about access (``projects.access`` does), and never sends to sockets itself: presence, fan-out and
history belong to ``realtime``.
"""
