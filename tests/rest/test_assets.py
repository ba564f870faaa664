"""Scripts, styles, pages and documents: compressed, cached by browsers, and never out of date."""

import gzip
import re
from collections.abc import AsyncIterator

import aiohttp
import pytest

from server.rest.assets import accepts_gzip

PAGES = ("/api-docs", "/api-docs/realtime", "/ops/queues/")
DOCUMENTS = ("/api-docs/swagger.json", "/api-docs/asyncapi.json")


@pytest.fixture
async def raw() -> AsyncIterator[aiohttp.ClientSession]:
    """A client that does not decompress bodies."""
    async with aiohttp.ClientSession(auto_decompress=False) as session:
        yield session


async def static_urls_of(http: aiohttp.ClientSession, base: str, page: str) -> list[str]:
    async with http.get(base + page) as response:
        return re.findall(r'(?:src|href)="(/[^"]+/static/[^"]+)"', await response.text())


async def all_urls(http: aiohttp.ClientSession, base: str) -> list[str]:
    parts = [part for page in PAGES for part in await static_urls_of(http, base, page)]
    return [*PAGES, *DOCUMENTS, *parts]


async def test_text_is_compressed_only_for_clients_that_accept_it(
    http: aiohttp.ClientSession, raw: aiohttp.ClientSession, server: str
) -> None:
    small = "/ops/queues/"
    paths = [path for path in await all_urls(http, server) if ".png" not in path and path != small]
    assert len(paths) >= 10
    for path in paths:
        async with raw.get(server + path, headers={"Accept-Encoding": "gzip, br"}) as response:
            packed, zipped = await response.read(), response.headers
        async with raw.get(server + path, headers={"Accept-Encoding": "identity"}) as response:
            body, plain = await response.read(), response.headers
        assert zipped.get("Content-Encoding") == "gzip", path
        assert "Content-Encoding" not in plain
        assert gzip.decompress(packed) == body
        assert len(packed) < 0.6 * len(body)
        for headers in (zipped, plain):
            assert "Accept-Encoding" in headers["Vary"]
            assert int(headers["Content-Length"]) == len(packed if headers is zipped else body)
        assert zipped["ETag"] != plain["ETag"]
        assert zipped["Content-Type"] == plain["Content-Type"]
        assert "charset=utf-8" in plain["Content-Type"]


@pytest.mark.parametrize("path", ["/api-docs/static/favicon-32x32.png", "/ops/queues/"])
async def test_images_and_small_pages_are_not_compressed(raw: aiohttp.ClientSession, server: str, path: str) -> None:
    async with raw.get(server + path, headers={"Accept-Encoding": "gzip"}) as response:
        assert response.status == 200
        assert "Content-Encoding" not in response.headers


async def test_unchanged_asset_gets_304_with_its_security_policy(http: aiohttp.ClientSession, server: str) -> None:
    for path in await all_urls(http, server):
        async with http.get(server + path) as first:
            expected = {name: first.headers.get(name) for name in ("ETag", "Cache-Control", "Content-Security-Policy")}
        async with http.get(server + path, headers={"If-None-Match": str(expected["ETag"])}) as again:
            assert (again.status, await again.read()) == (304, b"")
            assert {name: again.headers.get(name) for name in expected} == expected


async def test_scripts_and_styles_are_immutable_at_a_url_with_their_version(
    http: aiohttp.ClientSession, server: str
) -> None:
    for page, cache in (("/api-docs", "public"), ("/ops/queues/", "private")):
        parts = await static_urls_of(http, server, page)
        assert len(parts) >= 3
        for part in parts:
            async with http.get(server + part) as response:
                assert response.headers["Cache-Control"] == f"{cache}, max-age=31536000, immutable"
                assert part.partition("?v=")[2] in response.headers["ETag"]


@pytest.mark.parametrize(
    ("header", "accepted"),
    [
        ("gzip, deflate, br", True),
        ("GZIP;q=0.1", True),
        ("*", True),
        ("br;q=1, *;q=0.5", True),
        ("", False),
        ("identity", False),
        ("gzip;q=0", False),
        ("gzip;q=0.0, *", False),
        ("*;q=0", False),
        ("gzip;q=nonsense", False),
        ("xgzip", False),
    ],
)
def test_accept_encoding_follows_the_rfc(header: str, accepted: bool) -> None:
    assert accepts_gzip(header) is accepted
