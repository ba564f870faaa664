"""A process with only a sandbox, and its own user: the tests run their programs in it.

``python -m tests.jobs.runner TIER UID CONTROL`` reads requests from the socket CONTROL, an inherited descriptor, and
sends its responses there, one line of JSON each. As root it first switches to UID, so that one run of the tests covers
the tiers of root and of other users.
"""

import asyncio
import contextlib
import dataclasses
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import structlog

from server import loop
from server.jobs import launcher_client, tiers
from server.jobs.sandbox import FilesRejectedError, ProgramLimits, ProgramResult, Sandbox, SandboxError
from tests.devstack.pids import all_exited
from tests.timeouts import WAIT_TIMEOUT_SECONDS

ROOT = Path(__file__).parents[2]
SECRET = "a-secret-of-the-worker"
SYSTEM_PYTHON = "/usr/bin/python3"


class RunningProgram:
    """A program that runs, or has run."""

    def __init__(self, runner: "Runner", number: int) -> None:
        self._runner, self._number = runner, number

    def result(self) -> ProgramResult:
        """Wait for the end of the program and return its result.

        Raises:
            SandboxError: the program did not run.
        """
        answer = self._runner.wait_for_message(self._number, "outcome", "error", "cancelled")
        if "outcome" not in answer:
            raise SandboxError(answer.get("error", "cancelled"))
        return ProgramResult(**answer["outcome"])

    def wait_for_output(self) -> str:
        """Wait for the next output and return it."""
        text: str = self._runner.wait_for_message(self._number, "text")["text"]
        return text

    def cancel(self) -> None:
        """Cancel the program and wait until the sandbox confirms it."""
        self._runner.send(id=self._number, cancel=True)
        self._runner.wait_for_message(self._number, "cancelled")


class Runner:
    """The client of a runner process."""

    def __init__(self, tier: str, uid: int, folder: Path, *, streams: int | None = None) -> None:
        """Start the process.

        ``streams`` becomes its stdin, stdout and stderr; by default it has those of the tests, without stdin.
        """
        self.uid, self.folder = uid, folder
        self._numbers = iter(range(1 << 30))
        self._answers: list[dict[str, Any]] = []
        control, remote = socket.socketpair()
        with control, remote:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "tests.jobs.runner", tier, str(uid), str(remote.fileno())],
                stdin=subprocess.DEVNULL if streams is None else streams,
                stdout=streams,
                stderr=streams,
                pass_fds=[remote.fileno()],
                cwd=ROOT,
                env={**os.environ, "TMPDIR": str(folder), "WORKER_SECRET": SECRET},
            )
            self._control = control.makefile("rwb")
        try:
            hello = self._receive()
        except AssertionError:
            self.close()
            raise
        self.tier: str = hello["tier"]
        self.languages: list[str] = hello["languages"]

    @property
    def pid(self) -> int:
        return self._process.pid

    def start(
        self,
        code: str,
        language: str = "python",
        *,
        stdin: str = "",
        args: Sequence[str] = (),
        files: Mapping[str, str] | None = None,
        **limits: int,
    ) -> RunningProgram:
        number = next(self._numbers)
        self.send(
            id=number,
            language=language,
            code=code,
            stdin=stdin,
            args=list(args),
            files=dict(files or {}),
            limits={"timeout_seconds": 60, **limits},
        )
        return RunningProgram(self, number)

    def run(self, code: str, language: str = "python", **options: Any) -> ProgramResult:
        return self.start(code, language, **options).result()

    def alive(self) -> bool:
        return self._process.poll() is None

    def kill(self) -> None:
        """Kill the process, so that it cannot clean up."""
        self._process.kill()
        self._process.wait()

    def close(self) -> None:
        self._control.close()
        self._process.wait(timeout=WAIT_TIMEOUT_SECONDS)

    def send(self, **message: Any) -> None:
        self._control.write(json.dumps(message).encode() + b"\n")
        self._control.flush()

    def wait_for_message(self, number: int, *what: str) -> dict[str, Any]:
        """Wait for the first response to a request that has one of these keys."""
        seen = 0
        while True:
            for index in range(seen, len(self._answers)):
                answer = self._answers[index]
                if answer["id"] == number and any(name in answer for name in what):
                    return self._answers.pop(index)
            seen = len(self._answers)
            self._answers.append(self._receive())

    def _receive(self) -> dict[str, Any]:
        line = self._control.readline()
        if not line:
            raise AssertionError("the runner has exited")
        answer: dict[str, Any] = json.loads(line)
        return answer


def processes_with(word: str) -> list[int]:
    """Return the processes with this word in their arguments."""
    pids = []
    for path in Path("/proc").iterdir():
        with contextlib.suppress(OSError):
            if path.name.isdigit() and word.encode() in (path / "cmdline").read_bytes():
                pids.append(int(path.name))
    return pids


def wait_until_no_process(word: str, *, seconds: float = WAIT_TIMEOUT_SECONDS) -> bool:
    """Wait until no process has the word: another process reaps them, which may take a moment."""
    return all_exited(processes_with(word), seconds=seconds) and not processes_with(word)


# The process itself


async def serve(tier: str, control: socket.socket) -> None:
    reader, writer = await asyncio.open_connection(sock=control, limit=1 << 27)

    def tell(**message: Any) -> None:
        writer.write(json.dumps(message).encode() + b"\n")

    def tell_if_cancelled(number: int, job: asyncio.Task[None]) -> None:
        if job.cancelled():
            tell(id=number, cancelled=True)

    jobs: dict[int, asyncio.Task[None]] = {}
    box = await Sandbox.detect([candidate for candidate in tiers.TIERS if candidate.name == tier])
    tell(tier=box.tier.name, languages=box.languages)
    async for line in reader:
        request = json.loads(line)
        if "cancel" in request:
            jobs[request["id"]].cancel()
        else:
            number = request["id"]
            jobs[number] = asyncio.create_task(answer(box, request, tell))
            jobs[number].add_done_callback(lambda job, number=number: tell_if_cancelled(number, job))
    for job in jobs.values():
        job.cancel()
    await asyncio.gather(*jobs.values(), return_exceptions=True)
    await box.close()


async def answer(box: Sandbox, request: dict[str, Any], tell: Callable[..., None]) -> None:
    number = request["id"]
    try:
        outcome = await box.run(
            request["language"],
            request["code"],
            stdin=request["stdin"],
            args=request["args"],
            files={name: content.encode() for name, content in request["files"].items()},
            limits=ProgramLimits(**request["limits"]),
            on_output=lambda stream, offset, text: tell(id=number, stream=stream, offset=offset, text=text[:100]),
        )
    except (SandboxError, FilesRejectedError) as error:
        tell(id=number, error=f"{type(error).__name__}: {error}")
    else:
        tell(id=number, outcome=dataclasses.asdict(outcome))


async def warm_up_imports() -> None:
    await (await Sandbox.detect([])).close()


def switch_user(uid: int) -> None:
    """Switch to another user, with copies of files and an interpreter that this user can read."""
    copies = Path(tempfile.mkdtemp(prefix="copies-"))
    copies.chmod(0o755)
    launcher_client.LAUNCHER = Path(shutil.copy(launcher_client.LAUNCHER, copies))
    tiers.SANDBOX_CHILD = Path(shutil.copy(tiers.SANDBOX_CHILD, copies))
    asyncio.run(asyncio.to_thread(os.getpid))  # import what is needed later, before the switch
    loop.run(warm_up_imports())
    os.setgroups([])
    os.setresgid(uid, uid, uid)
    os.setresuid(uid, uid, uid)
    if not os.access(sys.executable, os.X_OK):
        sys.executable = SYSTEM_PYTHON


def main() -> None:
    tier, uid, control = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    structlog.configure(logger_factory=structlog.PrintLoggerFactory(sys.stderr))
    if uid != os.geteuid():
        switch_user(uid)
    loop.run(serve(tier, socket.socket(fileno=control)))  # the loop of a worker


if __name__ == "__main__":
    main()
