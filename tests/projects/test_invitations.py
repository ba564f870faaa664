"""Invitations: for an address without an account, by a token that is returned once."""

import asyncio
from uuid import uuid4

import aiohttp
import asyncpg

from server.projects import invitations
from tests.actors import Actor, Response


async def invite(owner: Actor, project: str, email: str, role: str = "COLLABORATOR") -> Response:
    invited = await owner.post(f"/projects/{project}/collaborators", {"email": email, "role": role})
    assert invited.status == 201, invited
    return invited


def newcomer(actor: Actor) -> Actor:
    return Actor(actor.http, actor.base, f"New{uuid4().hex[:6]}")


async def test_an_unknown_address_gets_an_invitation_whose_token_is_shown_once(alice: Actor) -> None:
    project, new = await alice.make_project(), newcomer(alice)
    invited = await invite(alice, project, new.email, "VIEWER")
    invitation = invited["invitation"]
    assert invited.headers["Cache-Control"] == "no-store"
    assert {"projectId": project, "email": new.email, "role": "VIEWER"}.items() <= invitation.items()
    assert invitation["invitedBy"]["id"] == alice.id
    listed = (await alice.get(f"/projects/{project}/invitations"))["items"]
    assert listed == [{key: value for key, value in invitation.items() if key != "token"}]


async def test_user_with_token_and_address_joins(alice: Actor) -> None:
    project, new = await alice.make_project(), newcomer(alice)
    token = (await invite(alice, project, new.email, "VIEWER"))["invitation"]["token"]
    await new.register()
    assert (await new.get(f"/projects/{project}")).status == 404  # an account alone is no membership
    assert [invitation["projectId"] for invitation in (await new.get("/invitations"))["items"]] == [project]
    accepted = await new.post("/invitations/accept", {"token": token})
    assert (accepted.status, accepted["id"], accepted["role"]) == (200, project, "VIEWER")
    assert (await new.get("/invitations"))["items"] == []
    assert (await new.post("/invitations/accept", {"token": token})).status == 404  # used up


async def test_registration_with_the_token_joins_the_project(alice: Actor, http: aiohttp.ClientSession) -> None:
    project, new = await alice.make_project(), newcomer(alice)
    token = (await invite(alice, project, new.email))["invitation"]["token"]
    body = {"email": new.email, "password": new.password, "name": "New", "invitationToken": token}
    registered = await new.post("/auth/register", body)
    assert registered.status == 201
    new.access_token = registered["accessToken"]
    assert (await new.get(f"/projects/{project}"))["role"] == "COLLABORATOR"


async def test_token_cannot_be_used_by_another_address(alice: Actor, bob: Actor) -> None:
    project, new = await alice.make_project(), newcomer(alice)
    token = (await invite(alice, project, new.email))["invitation"]["token"]
    refused = await bob.post("/invitations/accept", {"token": token})
    assert (refused.status, refused.code) == (403, "forbidden")
    assert (await bob.get(f"/projects/{project}")).status == 404
    unknown = await bob.post("/invitations/accept", {"token": "x" * 43})
    assert (unknown.status, unknown.code) == (404, "not_found")


async def test_second_invitation_invalidates_the_old_token(alice: Actor) -> None:
    project, new = await alice.make_project(), newcomer(alice)
    old = (await invite(alice, project, new.email))["invitation"]
    fresh = (await invite(alice, project, new.email.upper(), "VIEWER"))["invitation"]
    assert (fresh["id"], fresh["role"]) == (old["id"], "VIEWER")
    assert len((await alice.get(f"/projects/{project}/invitations"))["items"]) == 1
    await new.register()
    assert (await new.post("/invitations/accept", {"token": old["token"]})).status == 404
    assert (await new.post("/invitations/accept", {"token": fresh["token"]})).status == 200


async def test_an_invitation_expires(alice: Actor, database_url: str) -> None:
    project, new = await alice.make_project(), newcomer(alice)
    invitation = (await invite(alice, project, new.email))["invitation"]
    await new.register()
    connection = await asyncpg.connect(database_url)
    await connection.execute("UPDATE invitations SET expires_at = now() WHERE id = $1", invitation["id"])
    await connection.close()
    refused = await new.post("/invitations/accept", {"token": invitation["token"]})
    assert (refused.status, refused.code) == (410, "gone")
    assert (await new.get("/invitations"))["items"] == []
    assert (await alice.get(f"/projects/{project}/invitations"))["items"] == []


async def test_withdrawn_invitation_cannot_be_accepted(alice: Actor) -> None:
    project, other, new = await alice.make_project(), await alice.make_project(), newcomer(alice)
    invitation = (await invite(alice, project, new.email))["invitation"]
    await new.register()
    assert (await alice.delete(f"/projects/{other}/invitations/{invitation['id']}")).status == 404
    assert (await alice.delete(f"/projects/{project}/invitations/{invitation['id']}")).status == 204
    assert (await alice.delete(f"/projects/{project}/invitations/{invitation['id']}")).status == 404
    assert (await new.post("/invitations/accept", {"token": invitation["token"]})).status == 404


async def test_one_of_twenty_concurrent_acceptances_succeeds(alice: Actor) -> None:
    project, new = await alice.make_project(), newcomer(alice)
    token = (await invite(alice, project, new.email))["invitation"]["token"]
    await new.register()
    responses = await asyncio.gather(*(new.post("/invitations/accept", {"token": token}) for _ in range(20)))
    assert sorted(response.status for response in responses) == [200] + [404] * 19
    assert (await alice.get(f"/projects/{project}"))["counts"]["collaborators"] == 2


async def test_adding_an_invited_user_uses_up_the_invitation(alice: Actor) -> None:
    project, new = await alice.make_project(), newcomer(alice)
    await invite(alice, project, new.email)
    await new.register()
    await alice.add(new, project, role="VIEWER")
    assert (await alice.get(f"/projects/{project}/invitations"))["items"] == []
    assert (await new.get("/invitations"))["items"] == []


async def test_only_the_owner_lists_and_creates_invitations(alice: Actor, bob: Actor) -> None:
    project = await alice.make_project(bob)
    assert (await bob.get(f"/projects/{project}/invitations")).status == 403
    assert (await bob.post(f"/projects/{project}/collaborators", {"email": "x@example.org"})).status == 403


async def test_invitations_that_expired_long_ago_are_deleted(alice: Actor, database_url: str) -> None:
    project = await alice.make_project()
    old, new = [(await invite(alice, project, newcomer(alice).email))["invitation"]["id"] for _ in range(2)]
    db = await asyncpg.connect(database_url)
    try:
        await db.execute("UPDATE invitations SET expires_at = now() - interval '31 days' WHERE id = $1", old)
        await db.execute("UPDATE invitations SET expires_at = now() - interval '29 days' WHERE id = $1", new)
        await invitations.delete_expired_invitations(db)
        left = await db.fetch("SELECT id::text FROM invitations WHERE project_id = $1", project)
    finally:
        await db.close()
    assert [row["id"] for row in left] == [new]
