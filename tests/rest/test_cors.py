"""Browsers of other origins: let in where CORS_ORIGIN says so, and nowhere else."""

import aiohttp

from tests.actors import Actor, Answer
from tests.conftest import MakeServer

OURS, THEIRS = "https://app.example.org", "https://evil.example.org"
ASKED = {"Access-Control-Request-Method": "PATCH", "Access-Control-Request-Headers": "authorization,if-match"}


async def preflight(actor: Actor, origin: str) -> Answer:
    return await actor.call("OPTIONS", "/auth/profile", headers={"Origin": origin, **ASKED})


async def test_a_known_origin_may_send_what_the_api_takes_and_read_what_it_answers(
    http: aiohttp.ClientSession, make_server: MakeServer
) -> None:
    browser = Actor(http, await make_server(cors_origin=(OURS,)), "Browser")
    asked = await preflight(browser, OURS)
    assert (asked.status, asked.headers["Access-Control-Allow-Origin"]) == (200, OURS)
    assert "PATCH" in asked.headers["Access-Control-Allow-Methods"]
    assert {"AUTHORIZATION", "IF-MATCH"} <= set(asked.headers["Access-Control-Allow-Headers"].upper().split(","))
    answer = await browser.get("/auth/profile", headers={"Origin": OURS})
    assert (answer.status, answer.headers["Access-Control-Allow-Origin"]) == (401, OURS)
    assert "X-Request-Id" in answer.headers["Access-Control-Expose-Headers"]
    assert "Origin" in answer.headers.getall("Vary")


async def test_an_unknown_origin_gets_a_problem_and_no_leave(
    http: aiohttp.ClientSession, make_server: MakeServer
) -> None:
    browser = Actor(http, await make_server(cors_origin=(OURS,)), "Browser")
    asked = await preflight(browser, THEIRS)
    assert (asked.status, asked.code) == (403, "forbidden")
    answer = await browser.get("/auth/profile", headers={"Origin": THEIRS})
    assert "Access-Control-Allow-Origin" not in answer.headers
    assert "Origin" in answer.headers.getall("Vary")  # or a cache would hand this answer to ours


async def test_development_lets_every_origin_in(http: aiohttp.ClientSession, make_server: MakeServer) -> None:
    browser = Actor(http, await make_server(cors_origin=("*",)), "Browser")
    assert (await preflight(browser, THEIRS)).status == 200
    answer = await browser.get("/auth/profile", headers={"Origin": THEIRS})
    assert answer.headers["Access-Control-Allow-Origin"] in ("*", THEIRS)
    assert "Access-Control-Allow-Credentials" not in answer.headers
