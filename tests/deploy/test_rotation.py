"""Test the rotation of secrets by docs/operations/rotate-secrets.md, with real restarts of servers."""

import secrets

import aiohttp

from server.devstack.stack import Stack
from tests.actors import Actor
from tests.processes import Processes

NEW = {"JWT_SECRET": secrets.token_urlsafe(48), "JWT_REFRESH_SECRET": secrets.token_urlsafe(48)}


def previous(pair: dict[str, str]) -> dict[str, str]:
    return {f"{name}_PREVIOUS": secret for name, secret in pair.items()}


async def test_a_rotation_in_three_restarts_logs_no_user_out(
    processes: Processes, stack: Stack, http: aiohttp.ClientSession
) -> None:
    old = {name: stack.environment[name] for name in NEW}
    before = processes.server()
    alice = await Actor(http, before.base, "Alice").register()

    # First step: all servers accept the new secrets, and still sign with the old ones.
    accepting = processes.server(**old, **previous(NEW))
    assert (await alice.at(accepting.base).get("/auth/profile")).status == 200
    assert before.terminate() == 0

    # Second step: servers sign with the new secrets. A server that is not restarted yet must accept their tokens.
    signing = processes.server(**NEW, **previous(old))
    client = alice.at(signing.base)
    assert (await client.get("/auth/profile")).status == 200
    client = await refreshed(client)
    assert (await client.at(accepting.base).get("/auth/profile")).status == 200
    client = await refreshed(client.at(accepting.base))
    client = await refreshed(client.at(signing.base))
    assert accepting.terminate() == 0

    # Third step: servers no longer accept the old secrets.
    after = processes.server(**NEW)
    assert (await client.at(after.base).get("/auth/profile")).status == 200
    await refreshed(client.at(after.base))
    assert (await alice.at(after.base).get("/auth/profile")).status == 401
    assert after.terminate() == 0


async def test_servers_refuse_each_others_tokens_without_the_first_step(
    processes: Processes, stack: Stack, http: aiohttp.ClientSession
) -> None:
    before = processes.server()
    signing = processes.server(**NEW, **previous({name: stack.environment[name] for name in NEW}))
    alice = await Actor(http, signing.base, "Alice").register()
    assert (await alice.at(before.base).get("/auth/profile")).status == 401


async def refreshed(actor: Actor) -> Actor:
    answer = await actor.post("/auth/refresh", {"refreshToken": actor.refresh_token})
    assert answer.status == 200, answer
    actor.access_token, actor.refresh_token = answer["accessToken"], answer["refreshToken"]
    return actor
