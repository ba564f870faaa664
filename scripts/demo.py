"""Run a short real session against a running server and print it as it happens."""

import argparse
import asyncio
import contextlib
import dataclasses
import signal
import sys
import tempfile
import time
from base64 import b64decode, b64encode
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any
from uuid import uuid4

import aiohttp
from pycrdt import Doc, Text

from server.child import Child
from server.devstack.dev import base_url
from server.devstack.stack import is_in_use, read_env
from server.settings import StackSettings, StartError, load_stack

ROOT = Path(__file__).parent.parent
START_TIMEOUT_SECONDS = 60
STOP_TIMEOUT_SECONDS = 60
JOB_TIMEOUT_SECONDS = 60
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
    """A failure of the demo, described in one line."""


def print_line(speaker: str, text: str) -> None:
    label = f"{speaker:>4}"
    if sys.stdout.isatty():
        label = f"\033[{COLOURS.get(speaker, '0')}m{label}\033[0m"
    print(f"{label}  {text}", flush=True)


class DemoUser:
    """A user of the demo, with a REST session and a socket."""

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
        print_line(self.name, f"registers as {self.email}")

    async def connect(self) -> None:
        self.socket = await self.http.ws_connect(f"{self.base}/ws", headers=self.headers)
        await self.receive("welcome")

    async def send(self, event: str, **data: Any) -> Any:
        """Send a frame and return the data of its ack; skip the frames before it."""
        id = uuid4().hex
        await self.socket.send_json({"event": event, "data": data, "id": id})
        return (await self.receive("ack", id=id))["data"]

    async def receive(self, event: str, **expected: Any) -> Any:
        async with asyncio.timeout(10):
            while True:
                frame = await self.socket.receive_json()
                if frame["event"] == "error":
                    raise DemoError(f"{self.name}: {frame['data']['message']}")
                if frame["event"] == event and all(frame.get(key) == value for key, value in expected.items()):
                    return frame

    async def receive_event(self, type: str) -> None:
        while (event := (await self.receive("collaboration:event"))["data"])["type"] != type:
            pass
        print_line(self.name, f"hears {type}: {event['userName']}")


async def run_session(base: str) -> None:
    async with aiohttp.ClientSession() as http:
        ada, bob = DemoUser(base, http, "Ada"), DemoUser(base, http, "Bob")
        await ada.register()
        await bob.register()
        project = await ada.call("POST", "/projects", {"name": "Analytical Engine"})
        print_line("Ada", f"creates the project “{project['name']}”")
        await ada.call("POST", f"/projects/{project['id']}/collaborators", {"email": bob.email})
        print_line("Ada", "adds Bob as a collaborator")
        workspace = await ada.call("POST", "/workspaces", {"projectId": project["id"], "name": "Number crunching"})
        print_line("Ada", f"creates the workspace “{workspace['name']}”")
        await join_workspace(ada, bob, workspace["id"])
        document = await edit_document(ada, bob, workspace["id"])
        await run_program(bob, document)
        await bob.socket.close()
        await ada.receive_event("USER_LEAVE")
        await ada.socket.close()


async def join_workspace(ada: DemoUser, bob: DemoUser, workspace: str) -> None:
    await ada.connect()
    await bob.connect()
    await ada.send("join:workspace", workspaceId=workspace)
    print_line("Ada", "joins the workspace over her WebSocket")
    joined = await bob.send("join:workspace", workspaceId=workspace)
    online = " and ".join(sorted(user["userName"] for user in joined["users"]))
    print_line("Bob", f"joins the workspace; online now: {online}")
    await ada.receive_event("USER_JOIN")


class Editor:
    """A user's copy of a document, synchronized with the other copies."""

    def __init__(self, person: DemoUser, document: str) -> None:
        self.person, self.document = person, document
        self.doc: Doc[Text] = Doc()
        self.text = self.doc.get("content", type=Text)

    async def open(self) -> "Editor":
        opened = await self.person.send("document:open", documentId=self.document)
        self.doc.apply_update(b64decode(opened["update"]))
        return self

    async def type(self, line: str) -> None:
        before = self.doc.get_state()
        self.text.insert(len(self.text), line)
        update = b64encode(self.doc.get_update(before)).decode()
        await self.person.send("document:update", documentId=self.document, update=update)

    async def receive(self) -> None:
        frame = await self.person.receive("document:update")
        self.doc.apply_update(b64decode(frame["data"]["update"]))


async def edit_document(ada: DemoUser, bob: DemoUser, workspace: str) -> str:
    """Let both users write a document, and return its id."""
    body = {"path": "main.py"}
    document = (await ada.call("POST", f"/workspaces/{workspace}/documents", body))["id"]
    print_line("Ada", "creates main.py; both open it")
    editors = {"Ada": await Editor(ada, document).open(), "Bob": await Editor(bob, document).open()}
    for name, line in PROGRAM:
        reader = editors["Bob" if name == "Ada" else "Ada"]
        started = time.perf_counter()
        await editors[name].type(line)
        await reader.receive()
        seen = (time.perf_counter() - started) * 1000
        print_line(name, f"types {line.splitlines()[0]!r}; {reader.person.name} sees it after {seen:.1f} ms")
    assert str(editors["Ada"].text) == str(editors["Bob"].text) == "".join(line for _, line in PROGRAM)
    return document


async def run_program(bob: DemoUser, document: str) -> None:
    payload = {"language": "python", "documentId": document}
    submitted = (await bob.call("POST", "/jobs", {"type": "CODE_EXECUTION", "payload": payload}))["job"]
    print_line("Bob", f"runs main.py: job {submitted['id']}")
    async with asyncio.timeout(JOB_TIMEOUT_SECONDS):
        job = await follow_job(bob, submitted["id"])
    if job["status"] != "completed":
        raise DemoError(f"the job {job['status']}: {job['error']}")
    result = job["result"]
    print_line("job", f"exit code {result['exitCode']} after {result['durationMs']} ms, sandbox: {result['sandbox']}")


async def follow_job(owner: DemoUser, id: str) -> Any:
    """Print the output and the states of a job until it ends, and return it."""
    shown, partial_line = "", ""
    while True:
        frame = await owner.socket.receive_json()
        data = frame["data"]
        if frame["event"] == "job:output" and data["jobId"] == id:
            *lines, partial_line = (partial_line + data["text"]).split("\n")
            for line in lines:
                print_line("job", f"│ {line}")
        elif frame["event"] == "job:updated" and data["job"]["id"] == id:
            job = data["job"]
            if job["status"] in ("completed", "failed", "cancelled"):
                return job
            if (state := describe_state(job)) != shown:
                print_line("job", shown := state)


def describe_state(job: dict[str, Any]) -> str:
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
async def running_server(base: str | None) -> AsyncIterator[str]:
    """Yield the address of a running server: the given one, that of scripts/dev, or that of a stack for the demo."""
    settings = load_stack()
    address = base or address_of(settings)
    if address and await is_ready(address):
        yield address
    elif base:
        raise DemoError(f"no server is ready at {base}")
    elif await is_starting(settings.data_dir):
        print_line("", "scripts/dev is starting: waiting for it")
        yield await wait_until_ready(lambda: address_of(settings), lambda: is_in_use(settings.data_dir))
    else:
        print_line("", "no server is running: starting one for the demo")
        with own_stack() as dev:
            yield await wait_until_ready(lambda: address_of(settings), lambda: dev.alive)


async def is_starting(data_dir: Path) -> bool:
    """Return whether scripts/dev uses the directory; retry for 2 s, because it may have been started just now."""
    for _ in range(10):
        if is_in_use(data_dir):
            return True
        await asyncio.sleep(0.2)
    return False


@contextlib.contextmanager
def own_stack() -> Iterator[Child]:
    """Run ``run.py dev`` during the demo.

    It stops when the demo is killed. If the demo fails, the log of the server stays.
    """
    with tempfile.NamedTemporaryFile(prefix="demo-", suffix=".log", delete=False) as file:
        log = Path(file.name)
    dev = Child("dev", [sys.executable, str(ROOT / "run.py"), "dev"], log=log, parent_death_signal=signal.SIGTERM)
    dev.start()
    try:
        yield dev
    except Exception:
        print_line("", f"the log of the server is {log}")
        raise
    else:
        log.unlink()
    finally:
        dev.send_stop_signal()
        dev.wait(timeout=STOP_TIMEOUT_SECONDS)


async def wait_until_ready(address: Callable[[], str | None], is_alive: Callable[[], bool]) -> str:
    deadline = time.monotonic() + START_TIMEOUT_SECONDS
    while time.monotonic() < deadline:
        base = address()
        if base and await is_ready(base):
            return base
        if not is_alive():
            raise DemoError("the server exited during its start")
        await asyncio.sleep(0.2)
    raise DemoError(f"the server was not ready within {START_TIMEOUT_SECONDS} s")


def address_of(settings: StackSettings) -> str | None:
    """Return the address that stack.env names: where the stack of the data directory serves, or last served."""
    try:
        environment = read_env(settings.data_dir / "stack.env")
        return base_url(dataclasses.replace(settings, host=environment["HOST"], port=int(environment["PORT"])))
    except (OSError, KeyError, ValueError):
        return None


async def main() -> None:
    parser = argparse.ArgumentParser(prog="scripts/demo", description=__doc__)
    parser.add_argument("--url", help="address of the server; default: the stack of scripts/dev, or one for the demo")
    async with running_server(parser.parse_args().url) as base:
        print_line("", f"playing against {base}")
        started_at = time.perf_counter()
        await run_session(base)
        print_line("", f"done in {time.perf_counter() - started_at:.1f} s")


async def run_until_sigterm() -> None:
    """Run the demo until SIGTERM, which stops it and its stack as Ctrl-C does."""
    session = asyncio.current_task()
    assert session is not None
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, session.cancel)
    await main()


if __name__ == "__main__":
    try:
        asyncio.run(run_until_sigterm())
    except (DemoError, StartError, TimeoutError, aiohttp.ClientError) as error:
        sys.exit(f"demo: {str(error) or 'timed out'}")
    except KeyboardInterrupt:
        sys.exit(130)
    except asyncio.CancelledError:
        sys.exit(143)
