"""Where a team's programs run: no network, no sight of the host, bounded in everything, nothing left behind.

``launcher.py`` does the confining, in a process of its own; here it is chosen what to confine with, tested once
at the worker's start, and started for each program. It never falls back to running unconfined.
"""

import asyncio
import codecs
import json
import os
import secrets
import shutil
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import structlog

log = structlog.get_logger()

LAUNCHER = Path(__file__).parent / "launcher.py"
OUTPUT_BYTES = 1 << 20
CHUNK = 64 << 10
STOP_SECONDS = 2.0
FIRST_UID, UIDS = 1_500_000_000, 1 << 26  # far from any user's

OnOutput = Callable[[str, int, str], None]
"""Called with the stream's name, the offset in characters and the text."""


class SandboxError(Exception):
    """The program could not be confined, so nothing ran."""


@dataclass(frozen=True)
class Limits:
    timeout_seconds: int = 10
    memory_mb: int = 128
    processes: int = 32
    file_mb: int = 16
    disk_mb: int = 64
    open_files: int = 256


SELF_TEST_LIMITS = Limits(timeout_seconds=60, memory_mb=256)
SELF_TEST_ATTEMPTS = 3


@dataclass(frozen=True)
class Outcome:
    exit_code: int | None
    signal: int | None
    stdout: str
    stderr: str
    truncated: bool
    timed_out: bool
    out_of_memory: bool
    duration_ms: int
    max_rss_kb: int
    sandbox: str


@dataclass(frozen=True)
class Language:
    """How a language's programs are started; ``file`` is what the code is called."""

    name: str
    file: str
    command: tuple[str, ...]
    # A runtime that reserves address space cannot be held by it; the watcher of resident memory does that.
    address_space_mb: Callable[[int], int] = lambda memory: memory + 64
    options: Callable[[int], tuple[str, ...]] = lambda _: ()
    exhausted: str = "MemoryError"  # what it says when an allocation fails


@dataclass(frozen=True)
class Tier:
    """One way to confine, from best to worst."""

    name: str
    own_uid: bool
    namespaces: bool


LANDLOCK_UID = Tier("landlock-uid", own_uid=True, namespaces=True)
LANDLOCK = Tier("landlock", own_uid=False, namespaces=True)
LANDLOCK_BARE = Tier("landlock-bare", own_uid=False, namespaces=False)
NO_TIER = Tier("none", own_uid=False, namespaces=False)


def tiers() -> tuple[Tier, ...]:
    return (LANDLOCK_UID,) if os.geteuid() == 0 else (LANDLOCK, LANDLOCK_BARE)


def installed() -> tuple[Language, ...]:
    """The languages that this machine has; one that cannot be confined is dropped by the self-test."""
    pythons = ("/usr/bin/python3", "/usr/local/bin/python3", os.path.realpath(sys.executable))
    found = [Language("python", "main.py", (python, "-I", "-u")) for python in pythons if os.access(python, os.X_OK)]
    if node := shutil.which("node", path="/usr/local/bin:/usr/bin"):
        found.append(
            Language(
                "javascript",
                "main.js",
                (node,),
                address_space_mb=lambda _: 4096,
                options=lambda memory: (f"--max-old-space-size={memory}",),
                exhausted="heap out of memory",
            )
        )
    if Path("/bin/bash").exists():
        found.append(Language("bash", "main.sh", ("/bin/bash",), exhausted="cannot allocate"))
    return tuple(found)


@dataclass
class Sandbox:
    tier: Tier
    _languages: Mapping[str, Language] = field(default_factory=dict)

    @property
    def languages(self) -> tuple[str, ...]:
        return tuple(self._languages)

    @classmethod
    async def detect(cls, candidates: Sequence[Tier] | None = None) -> "Sandbox":
        """The best tier whose self-test holds, with the languages that run in it; a sandbox without languages
        where none does."""
        for tier in tiers() if candidates is None else candidates:
            sandbox = cls(tier)
            for language in installed():
                if language.name not in sandbox._languages and await sandbox._works(language):
                    sandbox._languages = {**sandbox._languages, language.name: language}
            if "python" in sandbox._languages:
                return sandbox
        return cls(NO_TIER)

    async def run(
        self,
        language: str,
        code: str,
        *,
        stdin: str = "",
        args: Sequence[str] = (),
        files: Mapping[str, bytes] | None = None,
        limits: Limits = Limits(),
        on_output: OnOutput = lambda *_: None,
    ) -> Outcome:
        """Run a program to its end, or to the limit that ends it. Cancelling the call kills all of it.

        Raises:
            SandboxError: that language cannot be confined here; nothing ran.
        """
        if language not in self._languages:
            raise SandboxError(f"no sandbox for {language} here")
        return await self._run(
            self._languages[language],
            code,
            stdin=stdin,
            args=args,
            files=files or {},
            limits=limits,
            on_output=on_output,
        )

    async def _works(self, language: Language) -> bool:
        """Whether a program runs in it and, for Python, finds every door shut. A loaded machine may kill or starve
        one that would: what holds once, holds."""
        for _ in range(SELF_TEST_ATTEMPTS):
            if await self._is_confined(language):
                return True
        return False

    async def _is_confined(self, language: Language) -> bool:
        code = SELF_TESTS[language.name].replace("WORKER", str(os.getpid()))
        try:
            outcome = await self._run(
                language, code, stdin="", args=(), files={}, limits=SELF_TEST_LIMITS, on_output=lambda *_: None
            )
        except SandboxError as error:
            log.info("sandbox self-test", tier=self.tier.name, language=language.name, problem=str(error))
            return False
        held = outcome.stdout.strip() == "confined"
        if not held:
            problem = (outcome.stdout + outcome.stderr)[-200:] or f"signal {outcome.signal}"
            log.info(
                "sandbox self-test",
                tier=self.tier.name,
                language=language.name,
                problem=problem,
                timed_out=outcome.timed_out,
                out_of_memory=outcome.out_of_memory,
            )
        return held

    async def _run(
        self,
        language: Language,
        code: str,
        *,
        stdin: str,
        args: Sequence[str],
        files: Mapping[str, bytes],
        limits: Limits,
        on_output: OnOutput,
    ) -> Outcome:
        uid = FIRST_UID + secrets.randbelow(UIDS) if self.tier.own_uid else None
        root = Path(tempfile.mkdtemp(prefix="job-"))
        try:
            directory = _lay_out(root, language, code, files, uid)
            config = _config(root, directory, language, args, limits, self.tier, uid)
            (root / "config.json").write_text(json.dumps(config))
            shim = await _Shim.start(root / "config.json")
        except BaseException:
            shutil.rmtree(root, ignore_errors=True)
            raise
        stdout, stderr = _Output("stdout", on_output), _Output("stderr", on_output)
        told = await shim.until_end(stdin.encode(errors="replace"), stdout, stderr)
        return _outcome(told, stdout, stderr, language, self.tier)


class _Output:
    """One stream: the first MiB is kept, the rest is read and dropped."""

    def __init__(self, stream: str, on_output: OnOutput) -> None:
        self.text = ""
        self.truncated = False
        self._stream, self._on_output = stream, on_output
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._left = OUTPUT_BYTES
        self._parts: list[str] = []
        self._offset = 0

    async def read(self, reader: asyncio.StreamReader) -> None:
        while chunk := await reader.read(CHUNK):
            kept = chunk[: self._left]
            self._left -= len(kept)
            self.truncated = self.truncated or len(kept) < len(chunk)
            self._take(self._decoder.decode(kept))
        self._take(self._decoder.decode(b"", final=True))
        self.text = "".join(self._parts)

    def _take(self, text: str) -> None:
        if text:
            self._parts.append(text)
            self._on_output(self._stream, self._offset, text)
            self._offset += len(text)


class _Shim:
    """The launcher's process."""

    def __init__(self, process: asyncio.subprocess.Process, status: int) -> None:
        self._process, self._status = process, status

    @classmethod
    async def start(cls, config: Path) -> "_Shim":
        status, report = os.pipe()
        try:
            process = await asyncio.create_subprocess_exec(
                sys.executable,
                "-I",
                "-S",
                str(LAUNCHER),
                str(config),
                str(report),
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.PIPE,
                stderr=asyncio.subprocess.PIPE,
                pass_fds=[report],
                start_new_session=True,
                cwd="/",
                env={},  # nothing of ours in anybody's /proc/…/environ
            )
        except BaseException:
            os.close(status)
            raise
        finally:
            os.close(report)
        return cls(process, status)

    async def until_end(self, stdin: bytes, stdout: _Output, stderr: _Output) -> dict[str, Any]:
        assert self._process.stdout is not None
        assert self._process.stderr is not None
        try:
            await asyncio.gather(
                self._feed(stdin), stdout.read(self._process.stdout), stderr.read(self._process.stderr)
            )
            await self._process.wait()
            with open(self._status, "rb", closefd=False) as told:  # noqa: ASYNC230 - the writer has ended
                raw = told.read()
        except BaseException:
            await asyncio.shield(asyncio.ensure_future(self._stop()))
            raise
        finally:
            os.close(self._status)
        if not raw:
            raise SandboxError("the launcher was killed")
        outcome: dict[str, Any] = json.loads(raw)
        if "error" in outcome:
            raise SandboxError(outcome["error"])
        return outcome

    async def _feed(self, stdin: bytes) -> None:
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(stdin)
            await self._process.stdin.drain()
        except ConnectionError:
            return  # a program need not read its input
        finally:
            self._process.stdin.close()

    async def _stop(self) -> None:
        """The shim kills all that is below it and removes the directory; it is given a moment for that."""
        try:
            self._process.terminate()
            async with asyncio.timeout(STOP_SECONDS):
                await self._process.wait()
        except ProcessLookupError:
            return
        except TimeoutError:
            self._process.kill()


def _lay_out(root: Path, language: Language, code: str, files: Mapping[str, bytes], uid: int | None) -> Path:
    """The fresh directory with the program and the files it may read."""
    root.chmod(0o711)
    directory = root / "work"
    directory.mkdir(mode=0o700)
    for name, content in {**files, language.file: code.encode(errors="replace")}.items():
        path = directory / name
        if not path.resolve().is_relative_to(directory.resolve()):
            raise SandboxError(f"{name} is outside the directory")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    if uid is not None:
        for path in (directory, *directory.rglob("*")):
            os.chown(path, uid, uid)
    return directory


def _config(
    root: Path, directory: Path, language: Language, args: Sequence[str], limits: Limits, tier: Tier, uid: int | None
) -> dict[str, Any]:
    return {
        "worker": os.getpid(),
        "root": str(root),
        "directory": str(directory),
        "command": [*language.command, *language.options(limits.memory_mb), language.file, *args],
        "environment": {
            "PATH": "/usr/local/bin:/usr/bin:/bin",
            "HOME": str(directory),
            "TMPDIR": str(directory),
            "LANG": "C.UTF-8",
        },
        "uid": uid,
        "namespaces": tier.namespaces,
        "rules": _rules(directory, language),
        "timeout": limits.timeout_seconds,
        "memoryMb": limits.memory_mb,
        "addressSpaceMb": language.address_space_mb(limits.memory_mb),
        "processes": limits.processes,
        "fileMb": limits.file_mb,
        "diskMb": limits.disk_mb,
        "openFiles": limits.open_files,
    }


def _rules(directory: Path, language: Language) -> list[tuple[str, str]]:
    """What may be seen: the system's programs and libraries, harmless devices, and the job's own directory."""
    readable = ["/usr", "/lib", "/lib64", "/bin", "/sbin", "/etc/ld.so.cache", "/etc/localtime", "/etc/alternatives"]
    readable.append("/etc/ssl/openssl.cnf")  # node reads it at its start
    prefix = Path(language.command[0]).parent.parent
    if not str(prefix).startswith("/usr") and prefix != Path("/"):
        readable.append(str(prefix))
    devices = [f"/dev/{name}" for name in ("null", "zero", "full", "random", "urandom")]
    return [
        *((path, "read") for path in readable),
        *((path, "device") for path in devices),
        (str(directory), "write"),
    ]


def _outcome(told: dict[str, Any], stdout: _Output, stderr: _Output, language: Language, tier: Tier) -> Outcome:
    failed = told["exitCode"] != 0
    exhausted = failed and language.exhausted in stderr.text[-4096:]
    if told["why"] == "disk":
        stderr.text += "\n[killed: the disk limit was passed]\n"
    return Outcome(
        exit_code=told["exitCode"],
        signal=told["signal"],
        stdout=stdout.text,
        stderr=stderr.text,
        truncated=stdout.truncated or stderr.truncated,
        timed_out=told["why"] == "time" or told["signal"] == 24,  # SIGXCPU: the same limit, in CPU time
        out_of_memory=told["why"] == "memory" or exhausted,
        duration_ms=told["durationMs"],
        max_rss_kb=told["maxRssKb"],
        sandbox=tier.name,
    )


# Says "confined" when every door is shut, else which one is open. The other languages pass through the same doors.
SELF_TESTS = {
    "javascript": "console.log('confined')",
    "bash": "echo confined",
    "python": """
import os, signal, socket
def shut(what, door):
    try:
        door()
    except OSError:
        return
    raise SystemExit(what + " is open")
shut("network", lambda: socket.socket(socket.AF_INET, socket.SOCK_STREAM))
shut("unix sockets", lambda: socket.socket(socket.AF_UNIX, socket.SOCK_STREAM))
shut("host file", lambda: open("/etc/passwd"))
shut("process list", lambda: os.listdir("/proc"))
shut("root directory", lambda: os.listdir("/"))
shut("temporary directory", lambda: open("/tmp/sandbox-self-test", "w"))
shut("signal to the worker", lambda: os.kill(WORKER, 0))
shut("signal to process 1", lambda: os.kill(1, signal.SIGCONT) if os.getppid() != 1 else open("/etc/passwd"))
with open("written", "w") as file:
    file.write("here")
assert open("written").read() == "here" and not [k for k in os.environ if "SECRET" in k or "URL" in k]
print("confined")
""",
}
