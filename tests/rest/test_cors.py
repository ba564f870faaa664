"""Cross-origin requests of browsers: allowed for the origins in CORS_ORIGIN only."""

import aiohttp

from tests.actors import Actor, Response
from tests.conftest import MakeServer

OURS, THEIRS = "https://app.example.org", "https://evil.example.org"
ASKED = {"Access-Control-Request-Method": "PATCH", "Access-Control-Request-Headers": "authorization,if-match"}


async def preflight(actor: Actor, origin: str) -> Response:
    return await actor.call("OPTIONS", "/auth/profile", headers={"Origin": origin, **ASKED})


async def test_known_origin_may_send_requests_and_read_responses(
    http: aiohttp.ClientSession, make_server: MakeServer
) -> None:
    browser = Actor(http, await make_server(cors_origin=(OURS,)), "Browser")
    preflighted = await preflight(browser, OURS)
    assert (preflighted.status, preflighted.headers["Access-Control-Allow-Origin"]) == (200, OURS)
    assert "PATCH" in preflighted.headers["Access-Control-Allow-Methods"]
    assert {"AUTHORIZATION", "IF-MATCH"} <= set(preflighted.headers["Access-Control-Allow-Headers"].upper().split(","))
    response = await browser.get("/auth/profile", headers={"Origin": OURS})
    assert (response.status, response.headers["Access-Control-Allow-Origin"]) == (401, OURS)
    assert "X-Request-Id" in response.headers["Access-Control-Expose-Headers"]
    assert "Origin" in response.headers.getall("Vary")


async def test_unknown_origin_is_rejected_with_a_problem(http: aiohttp.ClientSession, make_server: MakeServer) -> None:
    browser = Actor(http, await make_server(cors_origin=(OURS,)), "Browser")
    preflighted = await preflight(browser, THEIRS)
    assert (preflighted.status, preflighted.code) == (403, "forbidden")
    response = await browser.get("/auth/profile", headers={"Origin": THEIRS})
    assert "Access-Control-Allow-Origin" not in response.headers
    assert "Origin" in response.headers.getall("Vary")  # else a cache would return this response to our origin


async def test_development_allows_every_origin(http: aiohttp.ClientSession, make_server: MakeServer) -> None:
    browser = Actor(http, await make_server(cors_origin=("*",)), "Browser")
    assert (await preflight(browser, THEIRS)).status == 200
    response = await browser.get("/auth/profile", headers={"Origin": THEIRS})
    assert response.headers["Access-Control-Allow-Origin"] in ("*", THEIRS)
    assert "Access-Control-Allow-Credentials" not in response.headers
