"""Visibility: the owner sees a job, and so do the members of its project."""

from uuid import uuid4

from tests.actors import Actor
from tests.jobs.requests import program_job, submit_job


async def test_job_without_a_project_is_visible_only_to_its_owner(alice: Actor, bob: Actor) -> None:
    job = (await submit_job(alice))["id"]
    assert (await alice.get(f"/jobs/{job}"))["id"] == job
    refused = await bob.get(f"/jobs/{job}")
    assert (refused.status, refused.code) == (404, "not_found")


async def test_job_of_a_project_is_visible_only_to_its_members(alice: Actor, bob: Actor, carol: Actor) -> None:
    project = await alice.make_project()
    await alice.add(bob, project, role="VIEWER")
    job = await submit_job(alice, projectId=project)
    assert (await bob.get(f"/jobs/{job['id']}"))["projectId"] == project
    assert (await carol.get(f"/jobs/{job['id']}")).status == 404


async def test_submitting_a_job_to_a_project_requires_the_collaborator_role(
    alice: Actor, bob: Actor, carol: Actor
) -> None:
    project = await alice.make_project()
    await alice.add(bob, project, role="VIEWER")
    workspace = await alice.make_workspace(project)
    for scope in ({"projectId": project}, {"workspaceId": workspace}):
        assert (await bob.post("/jobs", program_job() | scope)).code == "forbidden"
        assert (await carol.post("/jobs", program_job() | scope)).code == "not_found"
        assert (await alice.post("/jobs", program_job() | scope))["job"]["projectId"] == project


async def test_a_viewer_neither_cancels_nor_retries_the_jobs_of_others(alice: Actor, bob: Actor, carol: Actor) -> None:
    project = await alice.make_project(carol)
    await alice.add(bob, project, role="VIEWER")
    job = (await submit_job(alice, projectId=project, runAt="2100-01-01T00:00:00Z"))["id"]
    refused = await bob.post(f"/jobs/{job}/cancel")
    assert (refused.status, refused.code) == (403, "forbidden")
    assert (await alice.get(f"/jobs/{job}"))["status"] == "pending"
    assert (await carol.post(f"/jobs/{job}/cancel"))["status"] == "cancelled"  # a collaborator may
    refused = await bob.post(f"/jobs/{job}/retry")
    assert (refused.status, refused.code) == (403, "forbidden")
    assert (await alice.get(f"/jobs/{job}"))["status"] == "cancelled"


async def test_owner_who_became_a_viewer_can_cancel_their_job(alice: Actor, bob: Actor) -> None:
    project = await alice.make_project()
    member = await alice.add(bob, project)
    job = (await submit_job(bob, projectId=project, runAt="2100-01-01T00:00:00Z"))["id"]
    await alice.patch(f"/projects/{project}/collaborators/{member}", {"role": "VIEWER"})
    assert (await bob.post(f"/jobs/{job}/cancel"))["status"] == "cancelled"


async def test_workspace_of_another_project_is_rejected(alice: Actor) -> None:
    workspace, other = await alice.make_workspace(), await alice.make_project()
    refused = await alice.post("/jobs", program_job() | {"workspaceId": workspace, "projectId": other})
    assert (refused.status, refused.code) == (422, "validation_failed")


async def test_an_unknown_or_malformed_id_is_not_found(alice: Actor) -> None:
    for id in (uuid4(), "nonsense"):
        assert (await alice.get(f"/jobs/{id}")).status == 404
