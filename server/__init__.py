"""Collaborative Workspace Backend.

One package, arranged by feature, with three doors: requests (``rest``), sockets (``realtime``) and the
queue (``jobs`` with ``worker``). ``app.py`` puts the web process together, ``worker.py`` the worker process.
"""

from importlib.metadata import version

__version__ = version("collaborative-workspace-backend")
