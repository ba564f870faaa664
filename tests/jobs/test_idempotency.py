"""Idempotency keys: one key creates one job, however often and to whichever server it is posted."""

import asyncio

from redis.asyncio import Redis

from server.jobs import worker_registry
from tests.actors import Actor, Response
from tests.conftest import MakeServer
from tests.jobs.requests import program_job, submit_job, submit_with_key


async def test_200_posts_with_one_key_on_two_servers_make_one_job(
    make_server: MakeServer, isolated_stores: dict[str, str], make_actor
) -> None:
    first, second = await make_server(**isolated_stores), await make_server(**isolated_stores)
    alice = await make_actor("Alice", first)
    actors = [alice, alice.at(second)]
    answers = await asyncio.gather(*(post_until_acknowledged(actors[n % 2], "once") for n in range(200)))
    assert {answer["job"]["id"] for answer in answers} == {answers[0]["job"]["id"]}
    # The created job may belong to a request that got 503: then all repeated requests get a duplicate.
    assert sorted(answer.status for answer in answers)[:-1] == [200] * 199
    assert all(answer["duplicate"] == (answer.status == 200) for answer in answers)


async def post_until_acknowledged(actor: Actor, key: str) -> Response:
    """Post with the key until the response is not 503, which a slow store causes."""
    while (answer := await submit_with_key(actor, key)).status == 503:
        await asyncio.sleep(0.1)
    return answer


async def test_the_same_key_with_another_body_is_refused(alice: Actor) -> None:
    first = await submit_with_key(alice, "mine")
    assert (first.status, first.headers["Location"]) == (201, f"/api/v1/jobs/{first['job']['id']}")
    for other in (program_job("print(1)"), program_job() | {"priority": 9}):
        refused = await submit_with_key(alice, "mine", other)
        assert (refused.status, refused.code) == (422, "idempotency_key_reused")


async def test_order_of_keys_in_the_body_does_not_matter(alice: Actor) -> None:
    first = await submit_with_key(alice, "order", program_job(args=["x"], stdin="y"))
    body = program_job(args=["x"], stdin="y")
    reordered = {"payload": dict(reversed(body["payload"].items())), "priority": 5, "type": body["type"]}
    again = await submit_with_key(alice, "order", reordered)
    assert (again.status, again["job"]["id"]) == (200, first["job"]["id"])


async def test_repeated_request_succeeds_despite_later_changes(
    make_server: MakeServer, isolated_stores: dict[str, str], make_actor
) -> None:
    ada = await make_actor("Ada", await make_server(**isolated_stores))
    workspace = await ada.make_workspace()
    document = await ada.post(f"/workspaces/{workspace}/documents", {"path": "a.py", "content": "1"})
    body = {"type": "CODE_EXECUTION", "payload": {"language": "python", "documentId": document["id"]}}
    first = await submit_with_key(ada, "mine", body)
    await ada.delete(f"/documents/{document['id']}")
    async with Redis.from_url(isolated_stores["redis_url"]) as redis:
        await worker_registry.send_heartbeat(
            redis, worker_registry.WorkerHeartbeat("other", "landlock", ["bash"], ["high", "normal", "low"], 10)
        )
    await asyncio.sleep(worker_registry.CACHE_TTL_SECONDS + 0.1)
    again = await submit_with_key(ada, "mine", body)
    assert (again.status, again["job"]["id"]) == (200, first["job"]["id"])
    assert (await submit_with_key(ada, "other", body)).code == "not_found"
    assert (await submit_with_key(ada, "other")).code == "language_unavailable"


async def test_key_is_accepted_in_the_body_and_scoped_to_its_user(alice: Actor, bob: Actor) -> None:
    job = await submit_job(alice, idempotencyKey="shared")
    again = await submit_with_key(alice, "shared")
    assert (again.status, again["job"]["id"]) == (200, job["id"])
    assert (await submit_job(bob, idempotencyKey="shared"))["id"] != job["id"]
    contradiction = await alice.post("/jobs", program_job() | {"idempotencyKey": "a"}, headers={"Idempotency-Key": "b"})
    assert contradiction.status == 422


async def test_without_a_key_every_post_is_a_job(alice: Actor) -> None:
    assert (await submit_job(alice))["id"] != (await submit_job(alice))["id"]
