"""What stays the same while the process lives: scripts, styles, pages and documents. Each is compressed once."""

import asyncio
import gzip
import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path

from aiohttp import hdrs, web

from server.ratelimit import limit
from server.rest.etags import unchanged
from server.rest.marks import public

IMMUTABLE = "max-age=31536000, immutable"
MINUTE = "public, max-age=60"
MIN_COMPRESSED_BYTES = 1024
_OF_THE_BODY = (hdrs.CONTENT_TYPE, hdrs.CONTENT_ENCODING)
CONTENT_TYPES = {".css": "text/css", ".js": "text/javascript", ".png": "image/png"}


@dataclass(frozen=True)
class Variant:
    """The body in one encoding, with its headers."""

    body: bytes
    tag: str
    headers: Mapping[str, str]

    def answer(self, request: web.Request) -> web.Response:
        if unchanged(request, self.tag):
            # All that is not about the body: a browser replaces what it has kept, the policy too, by these headers.
            kept = {name: value for name, value in self.headers.items() if name not in _OF_THE_BODY}
            return web.Response(status=304, headers=kept)
        return web.Response(body=self.body, headers=self.headers)


class Asset:
    """A body that never changes, and the headers of its answers. ``load`` is called once, in a thread."""

    def __init__(
        self, load: Callable[[], bytes], content_type: str, *, cache: str, headers: Mapping[str, str] | None = None
    ) -> None:
        self._load = load
        self._is_text = not content_type.startswith("image/")
        shown = f"{content_type}; charset=utf-8" if self._is_text else content_type
        self._headers = {hdrs.CONTENT_TYPE: shown, hdrs.CACHE_CONTROL: cache, **(headers or {})}
        self._variants: tuple[Variant, Variant] | None = None

    @classmethod
    def of_file(cls, path: Path, *, cache: str) -> "Asset":
        return cls(path.read_bytes, CONTENT_TYPES[path.suffix], cache=cache)

    @cached_property
    def body(self) -> bytes:
        return self._load()

    @cached_property
    def tag(self) -> str:
        """The version: a hash of the body. It is the ETag, and part of the address of what is immutable."""
        return hashlib.sha256(self.body).hexdigest()[:16]

    @limit(None)
    @public
    async def answer(self, request: web.Request) -> web.Response:
        """Answer a GET in the encoding that the client takes; with 304 where it has the body already."""
        if self._variants is None:
            self._variants = await asyncio.to_thread(self._encoded)
        plain, compressed = self._variants
        return (compressed if accepts_gzip(request.headers.get(hdrs.ACCEPT_ENCODING, "")) else plain).answer(request)

    def _encoded(self) -> tuple[Variant, Variant]:
        """The body as it is, and as gzip where that is worth it. Each has a strong ETag of its own (RFC 9110)."""
        headers = {**self._headers, hdrs.ETAG: f'"{self.tag}"'}
        if not self._is_text or len(self.body) < MIN_COMPRESSED_BYTES:
            plain = Variant(self.body, self.tag, headers)
            return plain, plain
        headers[hdrs.VARY] = hdrs.ACCEPT_ENCODING
        tag = f"{self.tag}-gzip"
        compressed = {**headers, hdrs.ETAG: f'"{tag}"', hdrs.CONTENT_ENCODING: "gzip"}
        return Variant(self.body, self.tag, headers), Variant(gzip.compress(self.body, mtime=0), tag, compressed)


@lru_cache(64)
def accepts_gzip(header: str) -> bool:
    """Read ``Accept-Encoding`` (RFC 9110, 12.5.3): ``gzip``, or ``*``, with a weight above 0."""
    weights: dict[str, float] = {}
    for part in header.lower().split(","):
        name, _, weight = part.partition(";")
        try:
            weights[name.strip()] = float(weight.partition("=")[2] or 1)
        except ValueError:
            weights[name.strip()] = 0
    return weights.get("gzip", weights.get("*", 0)) > 0
