"""The mark of tests that need IPv6 on this machine."""

import socket

import pytest


def _is_there() -> bool:
    try:
        with socket.create_server(("::1", 0), family=socket.AF_INET6):
            return True
    except OSError:
        return False


needs_ipv6 = pytest.mark.skipif(not _is_there(), reason="this machine has no IPv6")
