"""Lists and counts of jobs."""

from tests.actors import Actor
from tests.conftest import MakeActor, MakeServer
from tests.jobs.requests import program_job, submit_job

LATER = "2100-01-01T00:00:00Z"


async def pages(actor: Actor, query: str) -> list[list[str]]:
    listed, cursor = [], ""
    while True:
        page = await actor.get(f"/jobs?{query}{cursor}")
        assert page.status == 200, page
        listed.append([job["id"] for job in page["items"]])
        if page["nextCursor"] is None:
            return listed
        cursor = f"&cursor={page['nextCursor']}"


async def test_own_jobs_are_listed_newest_first_in_pages(alice: Actor, bob: Actor) -> None:
    created = [(await submit_job(alice, runAt=LATER))["id"] for _ in range(5)]
    await submit_job(bob)
    listed = await pages(alice, "limit=2")
    assert listed == [created[:2:-1], created[2:0:-1], created[:1]]
    assert await pages(alice, "") == [created[::-1]]


async def test_jobs_are_filtered_by_status_and_type(alice: Actor) -> None:
    first, second = [(await submit_job(alice, runAt=LATER))["id"] for _ in range(2)]
    await alice.post(f"/jobs/{first}/cancel")
    assert await pages(alice, "status=pending") == [[second]]
    assert await pages(alice, "status=cancelled&type=CODE_EXECUTION") == [[first]]
    assert await pages(alice, "status=failed") == [[]]
    for bad in ("status=lost", "type=MINING", "limit=0", "limit=101", "cursor=x"):
        assert (await alice.get(f"/jobs?{bad}")).status == 422


async def test_project_list_contains_the_jobs_of_all_members(alice: Actor, bob: Actor, carol: Actor) -> None:
    project = await alice.make_project(bob)
    mine = (await submit_job(alice, runAt=LATER, projectId=project))["id"]
    his = (await submit_job(bob, runAt=LATER, projectId=project))["id"]
    await submit_job(alice, runAt=LATER)
    assert await pages(alice, f"projectId={project}") == [[his, mine]]
    assert (await carol.get(f"/jobs?projectId={project}")).status == 404


async def test_a_page_of_large_jobs_ends_early(alice: Actor) -> None:
    large = program_job("#" * 250_000, stdin="x" * 250_000)
    created = [(await submit_job(alice, large, runAt=LATER))["id"] for _ in range(12)]
    listed = await pages(alice, "limit=100")
    assert len(listed) > 1
    assert [job for page in listed for job in page] == created[::-1]


async def test_stats_count_jobs_by_status_and_in_the_queues(
    make_server: MakeServer, make_actor: MakeActor, isolated_stores: dict[str, str]
) -> None:
    alice = await make_actor("Alice", await make_server(**isolated_stores))
    for _ in range(6):  # more than a user has slots, and without a worker
        await submit_job(alice)
    late = [(await submit_job(alice, runAt=LATER))["id"] for _ in range(2)]
    await alice.post(f"/jobs/{late[0]}/cancel")
    assert (await alice.get("/jobs/stats")).body == {
        "user": {"pending": 7, "processing": 0, "completed": 0, "failed": 0, "cancelled": 1},
        "queue": {"queued": 6, "active": 0, "scheduled": 1, "workers": 0},
    }


async def test_unchanged_job_is_answered_with_304(alice: Actor) -> None:
    job = (await submit_job(alice, runAt=LATER))["id"]
    tag = (await alice.get(f"/jobs/{job}")).headers["ETag"]
    assert (await alice.get(f"/jobs/{job}", headers={"If-None-Match": tag})).status == 304
    await alice.post(f"/jobs/{job}/cancel")
    assert (await alice.get(f"/jobs/{job}", headers={"If-None-Match": tag})).status == 200
