"""A short real session, played against a running server and shown as it happens."""

import argparse
import asyncio
import contextlib
import os
import subprocess
import sys
import time
from base64 import b64decode, b64encode
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any
from uuid import uuid4

import aiohttp
from pycrdt import Doc, Text

from server.devstack.stack import read_env

ROOT = Path(__file__).parent.parent
START_SECONDS = 60
PASSWORD = "Lovelace1815"
PROGRAM = (
    ("Ada", "import sys\n"),
    ("Bob", "print('hello from', sys.version.split()[0])\n"),
    ("Ada", "for n in range(5):\n    print(n, n * n)\n"),
    (
        "Bob",
        "try:\n    open('/etc/shadow')\nexcept OSError as error:\n    print('the sandbox says:', error.strerror)\n",
    ),
)
COLOURS = {"Ada": "36", "Bob": "33", "job": "32", "": "2"}


class DemoError(Exception):
    """Something did not go as it should; one line."""


def tell(who: str, what: str) -> None:
    label = f"{who:>4}"
    if sys.stdout.isatty():
        label = f"\033[{COLOURS.get(who, '0')}m{label}\033[0m"
    print(f"{label}  {what}", flush=True)


class Person:
    """A user with a REST session and a socket."""

    def __init__(self, base: str, http: aiohttp.ClientSession, name: str) -> None:
        self.base, self.http, self.name = base, http, name
        self.email = f"{name.lower()}-{uuid4().hex[:8]}@example.org"
        self.headers: dict[str, str] = {}
        self.socket: aiohttp.ClientWebSocketResponse

    async def call(self, method: str, path: str, body: Any = None) -> Any:
        url = f"{self.base}/api/v1{path}"
        async with self.http.request(method, url, json=body, headers=self.headers) as answer:
            content = await answer.json(content_type=None)
            if answer.status >= 400:
                wait = answer.headers.get("Retry-After")
                raise DemoError(f"{method} {path}: {content['detail']}" + (f" (try in {wait} s)" if wait else ""))
            return content

    async def register(self) -> None:
        body = {"email": self.email, "password": PASSWORD, "name": self.name}
        signed_in = await self.call("POST", "/auth/register", body)
        self.headers = {"Authorization": f"Bearer {signed_in['accessToken']}"}
        tell(self.name, f"registers as {self.email}")

    async def connect(self) -> None:
        self.socket = await self.http.ws_connect(f"{self.base}/ws", headers=self.headers)
        await self.hear("welcome")

    async def say(self, event: str, **data: Any) -> Any:
        """Send a frame and wait for its ack; what comes before it is shown."""
        id = uuid4().hex
        await self.socket.send_json({"event": event, "data": data, "id": id})
        return (await self.hear("ack", id=id))["data"]

    async def hear(self, event: str, **expected: Any) -> Any:
        async with asyncio.timeout(10):
            while True:
                frame = await self.socket.receive_json()
                if frame["event"] == "error":
                    raise DemoError(f"{self.name}: {frame['data']['message']}")
                if frame["event"] == event and all(frame.get(key) == value for key, value in expected.items()):
                    return frame

    async def hear_of(self, type: str) -> None:
        while (event := (await self.hear("collaboration:event"))["data"])["type"] != type:
            pass
        tell(self.name, f"hears {type}: {event['userName']}")


async def play(base: str) -> None:
    async with aiohttp.ClientSession() as http:
        ada, bob = Person(base, http, "Ada"), Person(base, http, "Bob")
        await ada.register()
        await bob.register()
        project = await ada.call("POST", "/projects", {"name": "Analytical Engine"})
        tell("Ada", f"creates the project “{project['name']}”")
        await ada.call("POST", f"/projects/{project['id']}/collaborators", {"email": bob.email})
        tell("Ada", "adds Bob as a collaborator")
        workspace = await ada.call("POST", "/workspaces", {"projectId": project["id"], "name": "Number crunching"})
        tell("Ada", f"creates the workspace “{workspace['name']}”")
        await meet(ada, bob, workspace["id"])
        document = await edit(ada, bob, workspace["id"])
        await run_program(bob, document)
        await bob.socket.close()
        await ada.hear_of("USER_LEAVE")
        await ada.socket.close()


async def meet(ada: Person, bob: Person, workspace: str) -> None:
    await ada.connect()
    await bob.connect()
    await ada.say("join:workspace", workspaceId=workspace)
    tell("Ada", "joins the workspace over her WebSocket")
    joined = await bob.say("join:workspace", workspaceId=workspace)
    online = " and ".join(sorted(user["userName"] for user in joined["users"]))
    tell("Bob", f"joins the workspace; online now: {online}")
    await ada.hear_of("USER_JOIN")


async def follow(ada: Person) -> None:
    """What Ada hears of the job, until Bob is gone."""
    while True:
        event = (await ada.hear("collaboration:event"))["data"]
        tell("Ada", f"hears {event['type']}: {event.get('status') or event['userName']}")
        if event["type"] == "USER_LEAVE":
            return


class Editor:
    """A person's copy of the document, in step with everybody else's."""

    def __init__(self, person: Person, document: str) -> None:
        self.person, self.document = person, document
        self.doc: Doc[Text] = Doc()
        self.text = self.doc.get("content", type=Text)

    async def open(self) -> "Editor":
        opened = await self.person.say("document:open", documentId=self.document)
        self.doc.apply_update(b64decode(opened["update"]))
        return self

    async def type(self, line: str) -> None:
        before = self.doc.get_state()
        self.text.insert(len(self.text), line)
        update = b64encode(self.doc.get_update(before)).decode()
        await self.person.say("document:update", documentId=self.document, update=update)

    async def hear(self) -> None:
        heard = await self.person.hear("document:update")
        self.doc.apply_update(b64decode(heard["data"]["update"]))


async def edit(ada: Person, bob: Person, workspace: str) -> str:
    """The document that both have written."""
    body = {"path": "main.py"}
    document = (await ada.call("POST", f"/workspaces/{workspace}/documents", body))["id"]
    tell("Ada", "creates main.py; both open it")
    editors = {"Ada": await Editor(ada, document).open(), "Bob": await Editor(bob, document).open()}
    for name, line in PROGRAM:
        reader = editors["Bob" if name == "Ada" else "Ada"]
        began = time.perf_counter()
        await editors[name].type(line)
        await reader.hear()
        seen = (time.perf_counter() - began) * 1000
        tell(name, f"types {line.splitlines()[0]!r}; {reader.person.name} sees it after {seen:.1f} ms")
    assert str(editors["Ada"].text) == str(editors["Bob"].text) == "".join(line for _, line in PROGRAM)
    return document


async def run_program(bob: Person, document: str) -> None:
    payload = {"language": "python", "documentId": document}
    job = (await bob.call("POST", "/jobs", {"type": "CODE_EXECUTION", "payload": payload}))["job"]
    tell("Bob", f"runs main.py: job {job['id']}")
    shown = ""
    async with asyncio.timeout(60):
        while job["status"] not in ("completed", "failed", "cancelled"):
            if (state := state_of(job)) != shown:
                tell("job", shown := state)
            await asyncio.sleep(0.1)
            job = await bob.call("GET", f"/jobs/{job['id']}")
    if job["status"] != "completed":
        raise DemoError(f"the job {job['status']}: {job['error']}")
    for line in job["result"]["stdout"].splitlines():
        tell("job", f"│ {line}")
    result = job["result"]
    tell("job", f"exit code {result['exitCode']} after {result['durationMs']} ms, sandbox: {result['sandbox']}")


def state_of(job: dict[str, Any]) -> str:
    if job["status"] == "pending" and job["error"]:
        return f"attempt {job['attempts']} failed ({job['error']['message']}); it is tried again"
    return f"{job['status']}, attempt {job['attempts']}" if job["attempts"] else str(job["status"])


async def is_ready(base: str) -> bool:
    try:
        timeout = aiohttp.ClientTimeout(total=2)
        async with aiohttp.ClientSession(timeout=timeout) as http, http.get(f"{base}/health/ready") as answer:
            return answer.status == 200
    except (aiohttp.ClientError, OSError, TimeoutError):
        return False


@contextlib.asynccontextmanager
async def running(base: str | None) -> AsyncIterator[str]:
    """The address of a running server: the given one, the stack's, or that of a stack started for the demo."""
    data_dir = Path(os.environ.get("DATA_DIR", ROOT / ".data"))
    found = base or address_of(data_dir)
    if found and await is_ready(found):
        yield found
        return
    if base:
        raise DemoError(f"no server is ready at {base}")
    tell("", "no server is running: starting one for the demo")
    port = os.environ.get("PORT", "3000")
    command = [sys.executable, str(ROOT / "run.py"), "dev"]
    log = (data_dir.parent / f".{data_dir.name}-demo.log").open("w+")
    dev = subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT)
    try:
        yield await started(f"http://127.0.0.1:{port}", dev, Path(log.name))
    finally:
        dev.terminate()
        dev.wait(timeout=60)
        Path(log.name).unlink(missing_ok=True)


async def started(base: str, dev: "subprocess.Popen[bytes]", log: Path) -> str:
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline:
        if await is_ready(base):
            return base
        if dev.poll() is not None:
            lines = log.read_text().strip().splitlines() or ["it said nothing"]
            raise DemoError(f"the server did not start: {lines[-1]}")
        await asyncio.sleep(0.2)
    raise DemoError(f"the server was not ready within {START_SECONDS} s")


def address_of(data_dir: Path) -> str | None:
    """Where the stack of this data directory serves, from its stack.env."""
    try:
        return f"http://127.0.0.1:{read_env(data_dir / 'stack.env')['PORT']}"
    except (OSError, KeyError):
        return None


async def main() -> None:
    parser = argparse.ArgumentParser(prog="scripts/demo", description=__doc__)
    parser.add_argument("--url", help="the server's address; without it: the stack of scripts/dev, or one of its own")
    async with running(parser.parse_args().url) as base:
        tell("", f"playing against {base}")
        started_at = time.perf_counter()
        await play(base)
        tell("", f"done in {time.perf_counter() - started_at:.1f} s")


if __name__ == "__main__":
    try:
        asyncio.run(main())
    except (DemoError, TimeoutError, aiohttp.ClientError) as error:
        sys.exit(f"demo: {error or 'no answer in time'}")
    except KeyboardInterrupt:
        sys.exit(130)
