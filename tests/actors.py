"""Users of the API in tests: ``await alice.post("/projects", {"name": "Engine"})``."""

import asyncio
from dataclasses import dataclass
from typing import Any
from uuid import uuid4

import aiohttp
import orjson

from tests.sockets import SocketClient
from tests.timeouts import WAIT_TIMEOUT_SECONDS

PASSWORD = "Lovelace1815"


@dataclass(frozen=True)
class Response:
    status: int
    body: Any
    headers: Any

    def __getitem__(self, key: str) -> Any:
        return self.body[key]

    @property
    def code(self) -> str:
        """The code of the problem, or the body if it is not a problem."""
        return self.body.get("code", f"no problem: {self.body}")


class Actor:
    """A user of one server; ``at`` returns the same user at another server."""

    def __init__(self, http: aiohttp.ClientSession, base: str, name: str) -> None:
        self.http, self.base, self.name = http, str(base).rstrip("/"), name
        self.email = f"{name.lower()}-{uuid4().hex[:12]}@example.org"
        self.password = PASSWORD
        self.id = ""
        self.access_token = ""
        self.refresh_token = ""
        self.sockets: list[SocketClient] = []

    def at(self, base: str) -> "Actor":
        twin = Actor(self.http, base, self.name)
        twin.email, twin.id, twin.sockets = self.email, self.id, self.sockets
        twin.access_token, twin.refresh_token = self.access_token, self.refresh_token
        return twin

    @property
    def headers(self) -> dict[str, str]:
        return {"Authorization": f"Bearer {self.access_token}"} if self.access_token else {}

    async def call(self, method: str, path: str, body: Any = None, **options: Any) -> Response:
        url = self.base + (path if path.startswith(("/api", "/health", "/ws", "/metrics")) else f"/api/v1{path}")
        headers = self.headers | options.pop("headers", {})
        if body is not None:
            options["json"] = body
        async with self.http.request(method, url, headers=headers, **options) as response:
            raw = await response.read()
            is_json = response.content_type.endswith("json")
            return Response(response.status, orjson.loads(raw) if is_json and raw else raw.decode(), response.headers)

    async def get(self, path: str, **options: Any) -> Response:
        return await self.call("GET", path, **options)

    async def post(self, path: str, body: Any = None, **options: Any) -> Response:
        return await self.call("POST", path, body, **options)

    async def patch(self, path: str, body: Any = None, **options: Any) -> Response:
        return await self.call("PATCH", path, body, **options)

    async def put(self, path: str, body: Any = None, **options: Any) -> Response:
        return await self.call("PUT", path, body, **options)

    async def delete(self, path: str, body: Any = None, **options: Any) -> Response:
        return await self.call("DELETE", path, body, **options)

    async def register(self) -> "Actor":
        body = {"email": self.email, "password": self.password, "name": self.name}
        return self._signed_in(await self.post("/auth/register", body), 201)

    async def log_in(self) -> "Actor":
        self.access_token = ""
        return self._signed_in(await self.post("/auth/login", {"email": self.email, "password": self.password}), 200)

    def _signed_in(self, response: Response, status: int) -> "Actor":
        assert response.status == status, response
        self.id = response["user"]["id"]
        self.access_token, self.refresh_token = response["accessToken"], response["refreshToken"]
        return self

    async def make_project(self, *members: "Actor", role: str = "COLLABORATOR", name: str = "Engine") -> str:
        project = await self.post("/projects", {"name": name})
        assert project.status == 201, project
        for member in members:
            await self.add(member, project["id"], role=role)
        return project["id"]

    async def add(self, member: "Actor", project: str, *, role: str = "COLLABORATOR") -> str:
        """Add a member to a project; return the id of the collaborator."""
        added = await self.post(f"/projects/{project}/collaborators", {"email": member.email, "role": role})
        assert added.status == 201, added
        return added["collaborator"]["id"]

    async def make_workspace(self, project: str | None = None, *members: "Actor", role: str = "COLLABORATOR") -> str:
        project = project or await self.make_project(*members, role=role)
        workspace = await self.post("/workspaces", {"projectId": project, "name": "Numbers"})
        assert workspace.status == 201, workspace
        return workspace["id"]

    async def finished_job(self, job: str, *, seconds: float = WAIT_TIMEOUT_SECONDS) -> dict[str, Any]:
        """Wait until a job is completed, failed or cancelled; return it."""
        async with asyncio.timeout(seconds):
            while (response := await self.get(f"/jobs/{job}"))["status"] in ("pending", "processing"):
                await asyncio.sleep(0.05)
        return response.body

    async def connect(self, workspace: str | None = None, **options: Any) -> SocketClient:
        """Open a socket, and join the workspace if one is given."""
        raw = await self.http.ws_connect(f"{self.base}/ws", headers=self.headers, max_msg_size=0, **options)
        socket = SocketClient(raw)
        self.sockets.append(socket)
        socket.welcome = (await socket.next())["data"]
        if workspace:
            socket.joined = await socket.push("join:workspace", workspaceId=workspace)
        return socket
