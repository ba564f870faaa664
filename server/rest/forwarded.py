"""The client's address, also behind proxies.

``X-Forwarded-For`` is a list. Each proxy appends the address of its peer; some add the port, and brackets to an IPv6
address: ``203.0.113.7:4711``, ``[2001:db8::1]:443``.
"""

import time
from collections.abc import Sequence
from functools import lru_cache
from ipaddress import IPv4Address, IPv6Address, ip_address

import structlog
from aiohttp import web

from server import metrics
from server.settings import Network

log = structlog.get_logger()

MAX_ENTRY_LENGTH = 64  # an IPv6 address with port and brackets has at most 53 characters
WARNING_INTERVAL_SECONDS = 60.0
Address = IPv4Address | IPv6Address


class ClientAddressResolver:
    def __init__(self, trusted: Sequence[Network]) -> None:
        self._trusted = trusted
        self._next_warning = 0.0

    def resolve(self, request: web.Request) -> str:
        """Return the peer's address or, behind trusted proxies, the last forwarded one that is not a trusted proxy.

        A malformed entry hides its client, so the address of the proxy that added it is returned. All clients of that
        proxy then share one rate limit, so this is counted and logged.
        """
        peer = request.remote or "unknown"
        client = _peer_address(peer)
        if client is None:
            return peer
        for entry in _entries(request) if self._trusted else ():
            if not self._is_trusted(client):
                break
            forwarded = parse_entry(entry)
            if forwarded is None:
                self._warn(entry, proxy=client)
                break
            client = forwarded
        return str(client)

    def _is_trusted(self, address: Address) -> bool:
        return any(address in network for network in self._trusted)

    def _warn(self, entry: str, *, proxy: Address) -> None:
        """Count a malformed entry, and log one a minute: a proxy that adds one adds one to every request."""
        metrics.FORWARDED_MALFORMED.inc()
        now = time.monotonic()
        if now >= self._next_warning:
            self._next_warning = now + WARNING_INTERVAL_SECONDS
            log.warning("forwarded address malformed", entry=ascii(entry[:MAX_ENTRY_LENGTH]), proxy=str(proxy))


def parse_entry(entry: str) -> Address | None:
    """Return the address of an entry, an IPv4-mapped one as IPv4; None for anything else.

    A name (``unknown``, ``_hidden``: RFC 7239, section 6) is no address. An address with a zone counts as none, because
    a zone has no meaning on another host.
    """
    return _parse(entry) if len(entry) <= MAX_ENTRY_LENGTH and "%" not in entry else None


@lru_cache(4096)
def _parse(entry: str) -> Address | None:
    bracketed = entry.startswith("[")
    host, port = _split_brackets(entry) if bracketed else _split(entry)
    try:
        address = ip_address(host)
    except ValueError:
        return None
    if not _is_port(port) or (bracketed and address.version == 4):
        return None
    return _unmap_ipv4(address)


def _split(entry: str) -> tuple[str, str]:
    """Return the host, and ``:port`` or an empty string; all colons of IPv6 without brackets belong to the address."""
    host, colon, port = entry.partition(":")
    return (entry, "") if ":" in port else (host, colon + port)


def _split_brackets(entry: str) -> tuple[str, str]:
    host, bracket, port = entry[1:].partition("]")
    return (host, port) if bracket else ("", "")


def _is_port(text: str) -> bool:
    """Return whether the text is ``:`` and a port number, or empty."""
    digits = text[1:]
    return not text or (text[0] == ":" and digits.isascii() and digits.isdigit() and int(digits) <= 65535)


def _unmap_ipv4(address: Address) -> Address:
    """Return an IPv4 address as such; a dual-stack socket shows it as ``::ffff:192.0.2.1``."""
    return getattr(address, "ipv4_mapped", None) or address


@lru_cache(4096)
def _peer_address(peer: str) -> Address | None:
    """Return the address of a peer, which may have a zone; None for a peer without one (a Unix socket)."""
    try:
        return _unmap_ipv4(ip_address(peer))
    except ValueError:
        return None


def _entries(request: web.Request) -> list[str]:
    """Return the entries of ``X-Forwarded-For``, the nearest proxy's first."""
    forwarded = ",".join(request.headers.getall("X-Forwarded-For", ()))
    return [entry.strip() for entry in reversed(forwarded.split(",")) if entry.strip()]
