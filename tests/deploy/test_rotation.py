"""Rotating the secrets as docs/operations/rotate-secrets.md says, on servers that are really restarted."""

import secrets

import aiohttp

from server.devstack.stack import Stack
from tests.actors import Actor
from tests.processes import Processes

FRESH = {"JWT_SECRET": secrets.token_urlsafe(48), "JWT_REFRESH_SECRET": secrets.token_urlsafe(48)}


def previous(pair: dict[str, str]) -> dict[str, str]:
    return {f"{name}_PREVIOUS": secret for name, secret in pair.items()}


async def test_a_rotation_in_three_restarts_logs_nobody_out(
    processes: Processes, stack: Stack, http: aiohttp.ClientSession
) -> None:
    old = {name: stack.environment[name] for name in FRESH}
    before = processes.server()
    alice = await Actor(http, before.base, "Alice").register()

    # First: the new ones are accepted everywhere, and sign nothing yet.
    accepting = processes.server(**old, **previous(FRESH))
    assert (await alice.at(accepting.base).get("/auth/profile")).status == 200
    assert before.terminate() == 0

    # Second: they sign. A server that is not restarted yet must know what this one issues.
    signing = processes.server(**FRESH, **previous(old))
    moved = alice.at(signing.base)
    assert (await moved.get("/auth/profile")).status == 200
    moved = await refreshed(moved)
    assert (await moved.at(accepting.base).get("/auth/profile")).status == 200
    moved = await refreshed(moved.at(accepting.base))
    moved = await refreshed(moved.at(signing.base))
    assert accepting.terminate() == 0

    # Third: the old ones are forgotten.
    after = processes.server(**FRESH)
    assert (await moved.at(after.base).get("/auth/profile")).status == 200
    await refreshed(moved.at(after.base))
    assert (await alice.at(after.base).get("/auth/profile")).status == 401
    assert after.terminate() == 0


async def test_without_the_first_step_servers_refuse_each_others_tokens(
    processes: Processes, stack: Stack, http: aiohttp.ClientSession
) -> None:
    before = processes.server()
    signing = processes.server(**FRESH, **previous({name: stack.environment[name] for name in FRESH}))
    alice = await Actor(http, signing.base, "Alice").register()
    assert (await alice.at(before.base).get("/auth/profile")).status == 401


async def refreshed(actor: Actor) -> Actor:
    answer = await actor.post("/auth/refresh", {"refreshToken": actor.refresh_token})
    assert answer.status == 200, answer
    actor.access_token, actor.refresh_token = answer["accessToken"], answer["refreshToken"]
    return actor
