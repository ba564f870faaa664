"""Pagination of every list: each item appears once, in the order of the whole list."""

import asyncio
import io
from typing import Any

import pytest

from tests.actors import Actor
from tests.documents.editors import make_document
from tests.jobs.requests import program_job

SORTS = ("updatedAt", "-updatedAt", "createdAt", "-createdAt", "name", "-name")


async def make_things(alice: Actor) -> tuple[dict[str, str], int]:
    """Create a list of each kind; return the ids for paths and the number of items."""
    project = await alice.make_project(name="P0")
    workspace = await alice.make_workspace(project)
    document = await make_document(alice, workspace, content="0")
    count = 5
    for number in range(1, count):
        await alice.make_project(name=f"P{number // 2}")  # pairs of one name
        await alice.make_workspace(project)
        await make_document(alice, workspace, path=f"{number}.py")
        headers = {"Content-Type": "text/plain", "If-Match": "*"}
        await alice.put(f"/documents/{document}/content", data=io.BytesIO(str(number).encode()), headers=headers)
        await alice.at(alice.base).log_in()
    for number in range(count):
        await alice.post(f"/projects/{project}/collaborators", {"email": f"{number}-{alice.email}"})
        await alice.post("/jobs", {**program_job(), "runAt": "2100-01-01T00:00:00Z", "workspaceId": workspace})
    ids = {"project": project, "workspace": workspace, "document": document}
    return ids, count


LISTS = [
    *(f"/projects?sort={sort}" for sort in SORTS),
    "/projects/{project}/activity?",
    "/projects/{project}/invitations?",
    "/workspaces/project/{project}?",
    "/workspaces/{workspace}/documents?",
    "/documents/{document}/versions?",
    "/auth/sessions?",
    "/jobs?",
    "/jobs?projectId={project}",
    "/jobs?workspaceId={workspace}",
]


async def items(actor: Actor, path: str, **query: str) -> tuple[list[Any], str | None]:
    page = await actor.get(path, params=query)
    assert page.status == 200, page
    return page["items"], page["nextCursor"]


@pytest.mark.parametrize("limit", [1, 2, 3])
async def test_every_item_of_a_list_is_on_exactly_one_page(alice: Actor, limit: int) -> None:
    ids, count = await make_things(alice)

    async def check(template: str) -> None:
        path = template.format_map(ids)
        whole, _ = await items(alice, path, limit="100")
        assert len(whole) >= count, path
        seen, cursor = await items(alice, path, limit=str(limit))
        while cursor is not None:
            page, cursor = await items(alice, path, limit=str(limit), cursor=cursor)
            assert len(page) == limit or cursor is None
            seen += page
        assert seen == whole, path

    await asyncio.gather(*map(check, LISTS))
