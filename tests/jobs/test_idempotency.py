"""One key, one job, however often and wherever it is posted."""

import asyncio

from tests.actors import Actor
from tests.conftest import MakeServer
from tests.jobs.asking import ask, post_with_key, program


async def test_200_posts_with_one_key_on_two_servers_make_one_job(
    make_server: MakeServer, quiet: dict[str, str], make_actor
) -> None:
    first, second = await make_server(**quiet), await make_server(**quiet)
    alice = await make_actor("Alice", first)
    doors = [alice, alice.at(second)]
    answers = await asyncio.gather(*(post_with_key(doors[n % 2], "once") for n in range(200)))
    assert {answer["job"]["id"] for answer in answers} == {answers[0]["job"]["id"]}
    assert sorted(answer.status for answer in answers) == [200] * 199 + [201]
    assert [answer["duplicate"] for answer in answers].count(False) == 1


async def test_the_same_key_with_another_body_is_refused(alice: Actor) -> None:
    first = await post_with_key(alice, "mine")
    assert (first.status, first.headers["Location"]) == (201, f"/api/v1/jobs/{first['job']['id']}")
    for other in (program("print(1)"), program() | {"priority": 9}):
        refused = await post_with_key(alice, "mine", other)
        assert (refused.status, refused.code) == (422, "idempotency_key_reused")


async def test_the_key_may_stand_in_the_body_and_belongs_to_its_user(alice: Actor, bob: Actor) -> None:
    job = await ask(alice, idempotencyKey="shared")
    again = await post_with_key(alice, "shared")
    assert (again.status, again["job"]["id"]) == (200, job["id"])
    assert (await ask(bob, idempotencyKey="shared"))["id"] != job["id"]
    contradiction = await alice.post("/jobs", program() | {"idempotencyKey": "a"}, headers={"Idempotency-Key": "b"})
    assert contradiction.status == 422


async def test_without_a_key_every_post_is_a_job(alice: Actor) -> None:
    assert (await ask(alice))["id"] != (await ask(alice))["id"]
