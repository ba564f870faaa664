"""Announcements of project changes to the sockets in its workspaces. Call them after the commit.

None of these raises during an outage of Redis: every process then finds revoked access by its own periodic recheck. An
access change is published before any statement that may fail.
"""

from collections.abc import Mapping
from uuid import UUID

from asyncpg import Record

from server.postgres import Executor
from server.projects import store
from server.realtime.channels import Channels
from server.realtime.grants import Revocation


async def project_updated(db: Executor, channels: Channels, project: UUID, actor: UUID) -> None:
    context = await store.read_event_context(db, project=project, actor=actor)
    await channels.announce_committed(
        "PROJECT_UPDATED", workspaces=context["workspaces"], user=actor, name=context["name"], projectId=project
    )


async def project_deleted(channels: Channels, context: Record, *, actor: UUID) -> None:
    """Announce a deleted project; ``context`` is from ``store.read_event_context`` before the deletion."""
    await workspaces_deleted(channels, context["workspaces"], actor=actor, name=context["name"])


async def roles_changed(
    db: Executor, channels: Channels, project: UUID, actor: UUID, *, roles: Mapping[UUID, str]
) -> None:
    """Announce the new roles of existing members, by user: one after a change of role, two after a transfer."""
    await channels.access_changed(project=project, users=list(roles))
    context = await store.read_event_context(db, project=project, actor=actor)
    for subject, role in roles.items():
        await channels.announce_committed(
            "ROLE_CHANGED",
            workspaces=context["workspaces"],
            user=actor,
            name=context["name"],
            projectId=project,
            subjectId=subject,
            role=role,
        )


async def member_removed(channels: Channels, project: UUID, actor: UUID, *, user: UUID, name: str) -> None:
    """Announce that the owner removed a member, or that the member left. ``name`` is the actor's."""
    revocation = Revocation("left" if actor == user else "removed", actor, name)
    await channels.access_changed(project=project, users=[user], revocation=revocation)


async def workspaces_deleted(channels: Channels, workspaces: list[UUID], *, actor: UUID, name: str) -> None:
    await channels.announce_committed("WORKSPACE_DELETED", workspaces=workspaces, user=actor, name=name)
    await channels.deleted("workspace", workspaces, actor=actor, name=name)
