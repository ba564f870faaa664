"""Every write on a project or an account, each by an authorized user, and scenarios in which writes race.

The scenarios are created by SQL: over REST, creating one would take ten times the time of the race itself.
"""

from base64 import b64encode
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from uuid import UUID, uuid4

import aiohttp
import asyncpg

from server.auth import tokens
from server.auth.passwords import Hasher
from server.documents import updates
from server.projects.invitations import token_hash
from server.settings import Settings
from tests.actors import PASSWORD, Actor, Response
from tests.sockets import Closed, SocketClient

NAMES = ("Owner", "Member", "Invited", "Outsider")
TEXT = "one"
FIRST_UPDATE = updates.first(TEXT)


@dataclass
class RaceScenario:
    """A project with an owner, a member, two invitations and a workspace.

    It has two documents: their order by id is the reverse of their order by path and by age.
    """

    owner: Actor
    member: Actor
    invited: Actor  # has an invitation and an account
    outsider: Actor
    newcomer: Actor  # has an invitation and no account
    project: UUID = field(default_factory=uuid4)
    member_id: UUID = field(default_factory=uuid4)
    invitation: UUID = field(default_factory=uuid4)
    workspace: UUID = field(default_factory=uuid4)
    documents: list[UUID] = field(default_factory=lambda: sorted((uuid4(), uuid4()), reverse=True))
    sockets: list[SocketClient] = field(default_factory=list)

    @property
    def here(self) -> str:
        return f"/projects/{self.project}"

    async def prepare(self, moves: Sequence["Write"]) -> None:
        """Open the documents on one socket for each write that edits."""
        for _ in range(moves.count(RaceScenario.edit)):
            self.sockets.append(await self.member.connect())
            for document in self.documents:
                await self.sockets[-1].push("document:open", documentId=str(document))

    async def rename_project(self) -> Response:
        return await self.owner.patch(self.here, {"name": "Renamed"})

    async def delete_project(self) -> Response:
        return await self.owner.delete(self.here)

    async def transfer(self) -> Response:
        return await self.owner.post(f"{self.here}/transfer", {"userId": self.member.id})

    async def add_collaborator(self) -> Response:
        body = {"email": self.outsider.email, "role": "VIEWER"}
        return await self.owner.post(f"{self.here}/collaborators", body)

    async def invite(self) -> Response:
        return await self.owner.post(
            f"{self.here}/collaborators", {"email": self.newcomer.email, "role": "COLLABORATOR"}
        )

    async def change_role(self) -> Response:
        return await self.owner.patch(f"{self.here}/collaborators/{self.member_id}", {"role": "VIEWER"})

    async def remove_collaborator(self) -> Response:
        return await self.owner.delete(f"{self.here}/collaborators/{self.member_id}")

    async def leave(self) -> Response:
        return await self.member.delete(f"{self.here}/collaborators/{self.member_id}")

    async def withdraw_invitation(self) -> Response:
        return await self.owner.delete(f"{self.here}/invitations/{self.invitation}")

    async def accept_invitation(self) -> Response:
        return await self.invited.post("/invitations/accept", {"token": invitation_token(self.invited)})

    async def register_with_invitation(self) -> Response:
        body = {"email": self.newcomer.email, "password": PASSWORD, "name": "Newcomer"}
        return await self.newcomer.post("/auth/register", {**body, "invitationToken": invitation_token(self.newcomer)})

    async def create_workspace(self) -> Response:
        return await self.member.post("/workspaces", {"projectId": str(self.project), "name": "More"})

    async def rename_workspace(self) -> Response:
        return await self.member.patch(f"/workspaces/{self.workspace}", {"name": "Renamed"})

    async def delete_workspace(self) -> Response:
        return await self.member.delete(f"/workspaces/{self.workspace}")

    async def create_document(self) -> Response:
        return await self.member.post(f"/workspaces/{self.workspace}/documents", {"path": "c.txt", "content": TEXT})

    async def rename_document(self) -> Response:
        return await self.member.patch(f"/documents/{self.documents[0]}", {"path": "b.txt"})

    async def rename_other_document(self) -> Response:
        return await self.member.patch(f"/documents/{self.documents[1]}", {"path": "a.txt"})

    async def delete_document(self) -> Response:
        return await self.member.delete(f"/documents/{self.documents[0]}")

    async def write_document(self) -> Response:
        path, options = f"/documents/{self.documents[0]}/content", {"data": "two", "headers": {"If-Match": "*"}}
        return await self.member.put(path, **options)

    async def restore_document(self) -> Response:
        return await self.member.post(f"/documents/{self.documents[0]}/restore", {"version": 1})

    async def edit(self) -> Response:
        """Edit both documents at once; return the status that REST would have."""
        socket, update = self.sockets.pop(), b64encode(updates.first("x")).decode()
        try:
            for document in self.documents:
                await socket.send("document:update", {"documentId": str(document), "update": update}, id=str(document))
            return await self._edited(socket)
        except Closed:  # the project is deleted
            return Response(404, {}, {})
        finally:
            await socket.close()

    async def rename_owner(self) -> Response:
        return await self.owner.patch("/auth/profile", {"name": "Another"})

    async def rename_member(self) -> Response:
        return await self.member.patch("/auth/profile", {"name": "Another"})

    async def delete_owner(self) -> Response:
        return await self.owner.delete("/auth/profile", {"password": PASSWORD})

    async def delete_member(self) -> Response:
        return await self.member.delete("/auth/profile", {"password": PASSWORD})

    async def delete_invited(self) -> Response:
        return await self.invited.delete("/auth/profile", {"password": PASSWORD})

    async def log_in_as_member(self) -> Response:
        return await self.member.post("/auth/login", {"email": self.member.email, "password": PASSWORD})

    async def refresh_member(self) -> Response:
        return await self.member.post("/auth/refresh", {"refreshToken": self.member.refresh_token})

    async def change_password_of_member(self) -> Response:
        body = {"currentPassword": PASSWORD, "newPassword": PASSWORD + "2"}
        return await self.member.post("/auth/password", body)

    async def end_other_sessions_of_member(self) -> Response:
        return await self.member.delete("/auth/sessions")

    async def log_out_member(self) -> Response:
        return await self.member.post("/auth/logout", {"refreshToken": self.member.refresh_token})

    async def _edited(self, socket: SocketClient) -> Response:
        pending, answer = set(map(str, self.documents)), Response(200, {}, {})
        while pending:
            frame = await socket.next()
            pending.discard(frame.get("id"))
            if frame["event"] == "error":
                answer = Response(503 if frame["data"]["code"] == "unavailable" else 409, frame["data"], {})
        return answer


Write = Callable[[RaceScenario], Awaitable[Response]]
PROJECT_WRITES: tuple[Write, ...] = (
    RaceScenario.rename_project,
    RaceScenario.delete_project,
    RaceScenario.transfer,
    RaceScenario.add_collaborator,
    RaceScenario.invite,
    RaceScenario.change_role,
    RaceScenario.remove_collaborator,
    RaceScenario.leave,
    RaceScenario.withdraw_invitation,
    RaceScenario.accept_invitation,
    RaceScenario.register_with_invitation,
    RaceScenario.create_workspace,
    RaceScenario.rename_workspace,
    RaceScenario.delete_workspace,
    RaceScenario.create_document,
    RaceScenario.rename_document,
    RaceScenario.rename_other_document,
    RaceScenario.delete_document,
    RaceScenario.write_document,
    RaceScenario.restore_document,
    RaceScenario.edit,
    RaceScenario.rename_owner,
    RaceScenario.rename_member,
    RaceScenario.delete_owner,
    RaceScenario.delete_member,
    RaceScenario.delete_invited,
)
ACCOUNT_WRITES: tuple[Write, ...] = (
    RaceScenario.rename_member,
    RaceScenario.delete_member,
    RaceScenario.log_in_as_member,
    RaceScenario.refresh_member,
    RaceScenario.change_password_of_member,
    RaceScenario.end_other_sessions_of_member,
    RaceScenario.log_out_member,
)


def invitation_token(actor: Actor) -> str:
    return f"invitation-for-{actor.email}"


class ScenarioFactory:
    """A factory of scenarios whose users are signed in at one server."""

    def __init__(
        self, db: asyncpg.Connection, settings: Settings, http: aiohttp.ClientSession, base: str, password_hash: str
    ) -> None:
        self._db, self._http, self._base, self._password_hash = db, http, base, password_hash
        self._access_keys = tokens.KeyRing.from_secrets(settings.jwt_secret)
        self._refresh_keys = tokens.KeyRing.from_secrets(settings.jwt_refresh_secret)
        self._ttl = settings.access_token_ttl

    @classmethod
    async def at(
        cls, base: str, *, db: asyncpg.Connection, settings: Settings, http: aiohttp.ClientSession
    ) -> "ScenarioFactory":
        return cls(db, settings, http, base, await Hasher(rounds=4).hash(PASSWORD))

    async def make(self) -> RaceScenario:
        actors = {name: Actor(self._http, self._base, name) for name in (*NAMES, "Newcomer")}
        world = RaceScenario(*actors.values())
        async with self._db.transaction():
            await self._sign_up([actors[name] for name in NAMES])
            await self._found(world)
            await self._write_documents(world)
        return world

    async def _sign_up(self, actors: Sequence[Actor]) -> None:
        sessions = [uuid4() for _ in actors]
        for actor, session in zip(actors, sessions, strict=True):
            user, actor.refresh_token = uuid4(), tokens.new_secret()
            actor.id = str(user)
            actor.access_token = tokens.issue(
                user=user, session=session, keys=self._access_keys, now=datetime.now(UTC), ttl=self._ttl
            )
        await self._db.execute(
            """
            WITH given AS (
                SELECT * FROM unnest($1::uuid[], $2::text[], $3::text[], $4::uuid[], $5::bytea[])
                    AS given (id, email, name, session, token)
            ), made AS (
                INSERT INTO users (id, email, name, password_hash) SELECT id, email, name, $6 FROM given
            ), signed_in AS (
                INSERT INTO sessions (id, user_id, expires_at) SELECT session, id, now() + interval '1 hour' FROM given
            )
            INSERT INTO refresh_tokens (hash, session_id, expires_at)
            SELECT token, session, now() + interval '1 hour' FROM given
            """,
            [actor.id for actor in actors],
            [actor.email for actor in actors],
            [actor.name for actor in actors],
            sessions,
            [tokens.keyed_hashes(actor.refresh_token, self._refresh_keys)[0] for actor in actors],
            self._password_hash,
        )

    async def _found(self, world: RaceScenario) -> None:
        await self._db.execute("INSERT INTO projects (id, name) VALUES ($1, 'Engine')", world.project)
        await self._db.execute(
            """
            INSERT INTO members (id, project_id, user_id, role)
            VALUES (gen_random_uuid(), $1, $2, 'OWNER'), ($3, $1, $4, 'COLLABORATOR')
            """,
            world.project,
            world.owner.id,
            world.member_id,
            world.member.id,
        )
        await self._db.execute(
            """
            INSERT INTO invitations (id, project_id, email, role, token_hash, invited_by, expires_at)
            VALUES ($1, $2, $3, 'VIEWER', $4, $7, now() + interval '1 hour'),
                   (gen_random_uuid(), $2, $5, 'VIEWER', $6, $7, now() + interval '1 hour')
            """,
            world.invitation,
            world.project,
            world.invited.email,
            token_hash(invitation_token(world.invited)),
            world.newcomer.email,
            token_hash(invitation_token(world.newcomer)),
            world.owner.id,
        )
        await self._db.execute(
            "INSERT INTO activity (project_id, actor_id, action) SELECT $1, $2, 'made' FROM generate_series(1, 5)",
            world.project,
            world.owner.id,
        )

    async def _write_documents(self, world: RaceScenario) -> None:
        await self._db.execute(
            "INSERT INTO workspaces (id, project_id, name) VALUES ($1, $2, 'Numbers')", world.workspace, world.project
        )
        await self._db.execute(
            """
            WITH made AS (
                INSERT INTO documents (id, workspace_id, path, mime_type, size)
                SELECT id, $3, path, 'text/plain', $6 FROM unnest($1::uuid[], $2::text[]) AS given (id, path)
                RETURNING id
            ), logged AS (
                INSERT INTO document_updates (document_id, version, author_id, at, data)
                SELECT id, 1, $4, now(), $5 FROM made
            )
            INSERT INTO document_versions (document_id, version, cause, created_at, size)
            SELECT id, 1, 'created', now(), $6 FROM made
            """,
            world.documents,
            ["a.txt", "b.txt"],
            world.workspace,
            world.owner.id,
            FIRST_UPDATE,
            len(TEXT),
        )
