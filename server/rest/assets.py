"""Static bodies: scripts, styles, pages and documents that do not change in a process. Each is compressed once."""

import asyncio
import gzip
import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path

from aiohttp import hdrs, web

from server.ratelimit import limit
from server.rest.etags import is_not_modified
from server.rest.marks import public

CACHE_IMMUTABLE = "max-age=31536000, immutable"
CACHE_ONE_MINUTE = "public, max-age=60"
MIN_COMPRESSED_BYTES = 1024
_BODY_HEADERS = (hdrs.CONTENT_TYPE, hdrs.CONTENT_ENCODING)
CONTENT_TYPES = {".css": "text/css", ".js": "text/javascript", ".png": "image/png"}


@dataclass(frozen=True)
class EncodedBody:
    """The body in one encoding, with its headers."""

    body: bytes
    tag: str
    headers: Mapping[str, str]

    def respond(self, request: web.Request) -> web.Response:
        if is_not_modified(request, self.tag):
            # A browser updates the headers of its cached response with these: they must include the security policy.
            headers = {name: value for name, value in self.headers.items() if name not in _BODY_HEADERS}
            return web.Response(status=304, headers=headers)
        return web.Response(body=self.body, headers=self.headers)


class Asset:
    """A body that never changes, with the headers of its responses. ``load`` is called once, in a thread."""

    def __init__(
        self, load: Callable[[], bytes], content_type: str, *, cache: str, headers: Mapping[str, str] | None = None
    ) -> None:
        self._load = load
        self._is_text = not content_type.startswith("image/")
        content_type_header = f"{content_type}; charset=utf-8" if self._is_text else content_type
        self._headers = {hdrs.CONTENT_TYPE: content_type_header, hdrs.CACHE_CONTROL: cache, **(headers or {})}
        self._variants: tuple[EncodedBody, EncodedBody] | None = None

    @classmethod
    def of_file(cls, path: Path, *, cache: str) -> "Asset":
        return cls(path.read_bytes, CONTENT_TYPES[path.suffix], cache=cache)

    @cached_property
    def body(self) -> bytes:
        return self._load()

    @cached_property
    def tag(self) -> str:
        """The version: a hash of the body. It is the ETag, and part of the URL of an immutable asset."""
        return hashlib.sha256(self.body).hexdigest()[:16]

    @limit(None)
    @public
    async def respond(self, request: web.Request) -> web.Response:
        """Respond to a GET in an encoding that the client accepts, or with 304 if it has the body already."""
        if self._variants is None:
            self._variants = await asyncio.to_thread(self._encode)
        plain, compressed = self._variants
        return (compressed if accepts_gzip(request.headers.get(hdrs.ACCEPT_ENCODING, "")) else plain).respond(request)

    def _encode(self) -> tuple[EncodedBody, EncodedBody]:
        """Return the body plain and, if worth it, as gzip; each has a strong ETag of its own (RFC 9110)."""
        headers = {**self._headers, hdrs.ETAG: f'"{self.tag}"'}
        if not self._is_text or len(self.body) < MIN_COMPRESSED_BYTES:
            plain = EncodedBody(self.body, self.tag, headers)
            return plain, plain
        headers[hdrs.VARY] = hdrs.ACCEPT_ENCODING
        tag = f"{self.tag}-gzip"
        compressed = {**headers, hdrs.ETAG: f'"{tag}"', hdrs.CONTENT_ENCODING: "gzip"}
        return EncodedBody(self.body, self.tag, headers), EncodedBody(
            gzip.compress(self.body, mtime=0), tag, compressed
        )


@lru_cache(64)
def accepts_gzip(header: str) -> bool:
    """Return whether ``Accept-Encoding`` (RFC 9110, 12.5.3) has ``gzip``, or ``*``, with a weight above 0."""
    weights: dict[str, float] = {}
    for part in header.lower().split(","):
        name, _, weight = part.partition(";")
        try:
            weights[name.strip()] = float(weight.partition("=")[2] or 1)
        except ValueError:
            weights[name.strip()] = 0
    return weights.get("gzip", weights.get("*", 0)) > 0
