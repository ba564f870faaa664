"""SAQ's dashboard, for operators."""

import re

import aiohttp
import pytest

from server.devstack.stack import Stack
from server.jobs import dashboard
from tests.conftest import MakeActor, MakeServer, store_urls_of
from tests.jobs.requests import submit_job

CREDENTIALS = {"ops_username": "operator", "ops_password": "a secret of theirs"}


def basic(username: str, password: str) -> dict[str, str]:
    return {"Authorization": aiohttp.encode_basic_auth(username, password)}


OPERATOR = basic(*CREDENTIALS.values())


async def test_operator_sees_waiting_jobs(
    http: aiohttp.ClientSession, make_server: MakeServer, make_actor: MakeActor, isolated_stores: dict[str, str]
) -> None:
    base = await make_server(**isolated_stores, **CREDENTIALS)
    job = (await submit_job(await make_actor("Ada", base)))["id"]
    for path in ("", "/", "/queues/normal"):
        async with http.get(f"{base}/ops/queues{path}", headers=OPERATOR) as page:
            assert (page.status, page.content_type) == (200, "text/html")
            assets = re.findall(r'(?:src|href)="(/[^"]+)"', await page.text())
    assert len(assets) == 3
    for asset in assets:
        async with http.get(base + asset, headers=OPERATOR) as response:
            assert response.status == 200
            assert await response.text()
    async with http.get(f"{base}/ops/queues/api/queues", headers=OPERATOR) as response:
        queued = {queue["name"]: queue["queued"] for queue in (await response.json())["queues"]}
    assert queued == {"high": 0, "normal": 1, "low": 0}
    async with http.get(f"{base}/ops/queues/api/queues/normal", headers=OPERATOR) as response:
        [message] = (await response.json())["queue"]["jobs"]
    assert (message["key"], message["queue"]) == (f"{job}:1", "normal")
    async with http.get(f"{base}/ops/queues/api/queues/normal/jobs/{message['key']}", headers=OPERATOR) as response:
        assert (await response.json())["job"] == message


@pytest.mark.parametrize(
    "auth", [{}, basic("operator", "guessed"), {"Authorization": "Basic !"}, {"Authorization": "Bearer x"}]
)
async def test_requests_without_valid_credentials_get_a_challenge(
    http: aiohttp.ClientSession, make_server: MakeServer, auth: dict[str, str]
) -> None:
    base = await make_server(**CREDENTIALS)
    for path in ("/ops/queues", "/ops/queues/api/queues", "/ops/queues/static/app.js"):
        async with http.get(base + path, headers=auth) as refused:
            assert refused.status == 401
            assert refused.headers["WWW-Authenticate"].startswith("Basic")


async def test_dashboard_does_not_exist_in_production_without_credentials(
    http: aiohttp.ClientSession, make_server: MakeServer
) -> None:
    production = {"app_env": "production", "cors_origin": (), "bcrypt_rounds": 10}
    async with http.get(f"{await make_server(**production)}/ops/queues") as response:
        assert response.status == 404
    async with http.get(f"{await make_server(**production, **CREDENTIALS)}/ops/queues", headers=OPERATOR) as response:
        assert response.status == 200


async def test_dashboard_cannot_change_jobs(http: aiohttp.ClientSession, make_server: MakeServer) -> None:
    base = await make_server(**CREDENTIALS)
    for change in ("abort", "retry"):
        async with http.post(f"{base}/ops/queues/api/queues/normal/jobs/any/{change}", headers=OPERATOR) as refused:
            assert refused.status == 405
            assert "POST /api/v1/jobs/{id}/cancel" in (await refused.json())["detail"]
    for unknown in ("/api/queues/none", "/api/queues/low/jobs/none", "/static/none.js"):
        async with http.get(f"{base}/ops/queues{unknown}", headers=OPERATOR) as response:
            assert response.status == 404


@pytest.mark.parametrize(("old", "new"), dashboard.SCRIPT_PATCHES)
def test_saqs_page_still_contains_the_patched_code(old: str, new: str) -> None:
    script = dashboard.read_static_file("app.js").decode()
    assert new in script
    assert old not in script.replace(new, "")


async def test_dashboard_responds_503_without_redis(
    http: aiohttp.ClientSession, make_server: MakeServer, own_stack: Stack
) -> None:
    base = await make_server(**store_urls_of(own_stack))
    own_stack.valkey.kill()
    for path in ("", "/normal", "/normal/jobs/any"):
        async with http.get(f"{base}/ops/queues/api/queues{path}") as response:
            assert (response.status, (await response.json())["code"]) == (503, "unavailable")
