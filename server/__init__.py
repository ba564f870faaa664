"""Collaborative Workspace Backend.

One package, arranged by feature, with three transports: requests (``rest``), sockets (``realtime``) and the
queue (``jobs`` with ``worker``). ``app.py`` assembles the server process, ``worker.py`` the worker process. All input
and output of a process passes through one of the transports; features never import the modules that assemble them.
"""

from importlib.metadata import version

__version__ = version("collaborative-workspace-backend")
