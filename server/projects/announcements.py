"""What changes of a project mean to those who are live in its workspaces. To be called after the commit.

None of these raises where Redis is away: then every process finds lost access by itself. Access is seen to first,
before a statement that may fail.
"""

from collections.abc import Mapping
from uuid import UUID

from asyncpg import Record

from server.postgres import Executor
from server.projects import store
from server.realtime.channels import Channels
from server.realtime.peers import Revocation


async def project_updated(db: Executor, channels: Channels, project: UUID, actor: UUID) -> None:
    audience = await store.audience(db, project=project, actor=actor)
    await channels.report(
        "PROJECT_UPDATED", workspaces=audience["workspaces"], user=actor, name=audience["name"], projectId=project
    )


async def project_deleted(channels: Channels, audience: Record, *, actor: UUID) -> None:
    """``audience`` as ``store.audience`` gave it before the project was deleted."""
    await workspaces_deleted(channels, audience["workspaces"], actor=actor, name=audience["name"])


async def roles_changed(
    db: Executor, channels: Channels, project: UUID, actor: UUID, *, roles: Mapping[UUID, str]
) -> None:
    """``roles``: the new ones by user, two of them after a transfer. A new member's is none that changed."""
    await channels.access_changed(project=project, users=list(roles))
    audience = await store.audience(db, project=project, actor=actor)
    for subject, role in roles.items():
        await channels.report(
            "ROLE_CHANGED",
            workspaces=audience["workspaces"],
            user=actor,
            name=audience["name"],
            projectId=project,
            subjectId=subject,
            role=role,
        )


async def member_removed(channels: Channels, project: UUID, actor: UUID, *, user: UUID, name: str) -> None:
    """By the owner, or by themselves: then they have left. ``name`` is the actor's."""
    why = Revocation("left" if actor == user else "removed", actor, name)
    await channels.access_changed(project=project, users=[user], why=why)


async def workspaces_deleted(channels: Channels, workspaces: list[UUID], *, actor: UUID, name: str) -> None:
    await channels.report("WORKSPACE_DELETED", workspaces=workspaces, user=actor, name=name)
    await channels.gone("workspace", workspaces, actor=actor, name=name)
