"""Where a team's programs run: no network, no sight of the host, bounded in everything, nothing left behind.

``launcher.py`` does the confining, in processes of its own; here it is chosen what to confine with, tested once at the
worker's start, and told of each program. It never falls back to running unconfined.
"""

import asyncio
import codecs
import fcntl
import json
import os
import secrets
import shutil
import socket
import sys
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

import structlog

from server.jobs import cgroups

log = structlog.get_logger()

LAUNCHER = Path(__file__).parent / "launcher.py"
INSIDE = Path(__file__).parent / "inside.py"
OUTPUT_BYTES = 1 << 20
CHUNK = 64 << 10
STOP_SECONDS = 2.0
LAUNCHES = 3
FIRST_UID, UIDS = 1_500_000_000, 1 << 26  # far from any user's
MOST_FILES, MOST_FILE_BYTES, LONGEST_PATH = 2_000, 32 << 20, 1024
SIGXCPU = 24

OnOutput = Callable[[str, int, str], None]
"""Called with the stream's name, the offset in characters and the text."""


class SandboxError(Exception):
    """The program could not be confined, so nothing ran."""


class _NotLaunchedError(Exception):
    """The launcher has ended; another may run it."""


class FilesRefusedError(ValueError):
    """The files cannot be laid out: a path leads elsewhere, or they are too many."""


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
class Program:
    """What is to run."""

    language: Language
    code: str
    stdin: str = ""
    args: Sequence[str] = ()
    files: Mapping[str, bytes] = field(default_factory=dict)
    limits: Limits = Limits()


@dataclass(frozen=True)
class Tier:
    """One way to confine. Where the worker is root, each program has a user of its own in every tier."""

    name: str
    users: tuple[str, ...]  # whose worker may use it
    bubblewrap: bool = False
    cgroup: bool = False
    namespaces: bool = False


ROOT, SOMEBODY = "root", "somebody"
BWRAP_CGROUP = Tier("bwrap-cgroup", (ROOT, SOMEBODY), bubblewrap=True, cgroup=True)
BWRAP = Tier("bwrap", (ROOT, SOMEBODY), bubblewrap=True)
LANDLOCK_UID = Tier("landlock-uid", (ROOT,), namespaces=True)
LANDLOCK = Tier("landlock", (SOMEBODY,), namespaces=True)
LANDLOCK_BARE = Tier("landlock-bare", (SOMEBODY,))
TIERS = (BWRAP_CGROUP, BWRAP, LANDLOCK_UID, LANDLOCK, LANDLOCK_BARE)
"""From best to worst."""
NO_TIER = Tier("none", ())


def tiers() -> tuple[Tier, ...]:
    """Those for our user."""
    user = ROOT if os.geteuid() == 0 else SOMEBODY
    return tuple(tier for tier in TIERS if user in tier.users)


def installed() -> tuple[Language, ...]:
    """The languages that this machine has; one that cannot be confined is dropped by the self-test."""
    pythons = ("/usr/bin/python3", "/usr/local/bin/python3", os.path.realpath(sys.executable))
    found = [
        Language("python", "main.py", (python, "-E", "-s", "-B", "-u"))
        for python in pythons
        if os.access(python, os.X_OK)
    ]
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
    _launcher: "_Launcher | None" = None
    _cgroup: Path | None = None
    _languages: Mapping[str, Language] = field(default_factory=dict)
    _starting: asyncio.Lock = field(default_factory=asyncio.Lock)

    @property
    def languages(self) -> tuple[str, ...]:
        return tuple(self._languages)

    @classmethod
    async def detect(cls, candidates: Sequence[Tier] | None = None) -> "Sandbox":
        """The best tier whose self-test holds, with the languages that run in it; a sandbox without languages
        where none does. To be closed."""
        launcher = await _Launcher.start()
        for tier in tiers() if candidates is None else candidates:
            cgroup = cgroups.delegated() if tier.cgroup else None
            if tier.cgroup and cgroup is None:
                continue
            sandbox = cls(tier, launcher, cgroup)
            for language in installed():
                if language.name not in sandbox._languages and await sandbox._works(language):
                    sandbox._languages = {**sandbox._languages, language.name: language}
            if "python" in sandbox._languages:
                return sandbox
        await launcher.close()
        return cls(NO_TIER)

    async def close(self) -> None:
        """No program is to run any more."""
        if self._launcher is not None:
            await self._launcher.close()

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

        ``files`` by their relative paths are there for it to read: in ``../files``, and what stands at their top also
        under its own name in the program's directory.

        Raises:
            SandboxError: that language cannot be confined here; nothing ran.
            FilesRefusedError: the files cannot be laid out.
        """
        if language not in self._languages:
            raise SandboxError(f"no sandbox for {language} here")
        program = Program(self._languages[language], code, stdin, args, files or {}, limits)
        return await self._run(program, on_output)

    async def _works(self, language: Language) -> bool:
        """Whether a program runs in it and, for Python, finds every door shut. A loaded machine may kill or starve
        one that would: what holds once, holds."""
        for _ in range(SELF_TEST_ATTEMPTS):
            if await self._is_confined(language):
                return True
        return False

    async def _is_confined(self, language: Language) -> bool:
        assert self._launcher is not None
        secret, written = self._launcher.directory / "secret", self._launcher.directory / "written"
        secret.write_text("secret")
        args = (str(os.getpid()), str(secret), str(written))
        program = Program(
            language, SELF_TESTS[language.name], args=args, files={"given": b"given"}, limits=SELF_TEST_LIMITS
        )
        try:
            outcome = await self._run(program, lambda *_: None)
        except SandboxError as error:
            log.info("sandbox self-test", tier=self.tier.name, language=language.name, problem=str(error))
            return False
        held = outcome.stdout.strip() == "confined" and not written.exists()
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

    async def _run(self, program: Program, on_output: OnOutput) -> Outcome:
        for _ in range(LAUNCHES):
            launcher = await self._living_launcher()
            root = Path(tempfile.mkdtemp(prefix="job-", dir=launcher.directory))
            job = _Job(root, on_output)
            try:
                await _in_thread(self._lay_out, root, program)
                await job.start(launcher)
                told = await job.until_end()
            except BaseException as error:
                await _in_thread(shutil.rmtree, root, True)
                if not isinstance(error, _NotLaunchedError):
                    raise
            else:
                return _outcome(told, job, program.language, self.tier)
        raise SandboxError("the launcher ends again and again")

    async def _living_launcher(self) -> "_Launcher":
        async with self._starting:
            if self._launcher is None:
                raise SandboxError("no sandbox here")
            if not self._launcher.alive:
                log.warning("the launcher has ended; another is started")
                ended, self._launcher = self._launcher, await _Launcher.start()
                await ended.close()
            return self._launcher

    def _lay_out(self, root: Path, program: Program) -> None:
        """The job's directory: what the launcher must know, the input, the files, and the program in ``work``."""
        uid = _free_uid() if os.geteuid() == 0 else None
        root.chmod(0o711)
        work, files = root / "work", root / "files"
        work.mkdir(mode=0o700)
        files.mkdir(mode=0o755)
        for name in _laid_out(program.files, files):
            (work / name).symlink_to(Path("..", "files", name))
        code = work / program.language.file
        code.unlink(missing_ok=True)  # a file of that name is still to be had in ../files
        code.write_bytes(program.code.encode(errors="replace"))
        stdin = root / "stdin"
        stdin.write_bytes(program.stdin.encode(errors="replace"))
        for each in (work, code, stdin):
            os.chown(each, -1 if uid is None else uid, -1 if uid is None else uid)
        python = self._languages.get("python", program.language)
        config = _config(root, program, self.tier, uid, python) | _cgroup_config(self._cgroup, root, program.limits)
        (root / "config.json").write_text(json.dumps(config))


async def _in_thread(work: Callable[..., object], *arguments: object) -> None:
    """To its end, also when we are cancelled: what comes next must not meet it half done."""
    done = asyncio.ensure_future(asyncio.to_thread(work, *arguments))
    try:
        await asyncio.shield(done)
    except asyncio.CancelledError:
        await asyncio.wait({done})
        raise


def _laid_out(files: Mapping[str, bytes], directory: Path) -> set[str]:
    """Write them; the names at their top.

    Raises:
        FilesRefusedError: a path leads elsewhere, or they are too many.
    """
    if len(files) > MOST_FILES or sum(map(len, files.values())) > MOST_FILE_BYTES:
        raise FilesRefusedError("too many files")
    top = set()
    for name, content in files.items():
        parts = PurePosixPath(name).parts
        if not parts or parts[0] == "/" or ".." in parts or "\0" in name or len(name.encode()) > LONGEST_PATH:
            raise FilesRefusedError(f"not a path: {name[:100]!r}")
        path = directory.joinpath(*parts)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
        except OSError as error:
            raise FilesRefusedError(f"{name[:100]!r}: {error.strerror}") from error
        top.add(parts[0])
    return top


def _free_uid() -> int:
    """A user that owns nothing, of those that our user namespace has."""
    lines = Path("/proc/self/uid_map").read_text().splitlines()
    last = max(int(line.split()[0]) + int(line.split()[2]) for line in lines)
    span = min(UIDS, last // 2)
    return min(FIRST_UID, last - span) + secrets.randbelow(span)


class _Output:
    """One stream: the first MiB is kept, the rest is read and dropped."""

    def __init__(self, stream: str, on_output: OnOutput) -> None:
        self.truncated = False
        self._stream, self._on_output = stream, on_output
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._left = OUTPUT_BYTES
        self._parts: list[str] = []
        self._offset = 0

    @property
    def text(self) -> str:
        return "".join(self._parts)

    async def read(self, reader: asyncio.StreamReader) -> None:
        while chunk := await reader.read(CHUNK):
            kept = chunk[: self._left]
            self._left -= len(kept)
            self.truncated = self.truncated or len(kept) < len(chunk)
            self.take(self._decoder.decode(kept))
        self.take(self._decoder.decode(b"", final=True))

    def take(self, text: str) -> None:
        if text:
            self._parts.append(text)
            self._on_output(self._stream, self._offset, text)
            self._offset += len(text)


class _Launcher:
    """The process that forks a shim for each program, and the directory in which jobs have theirs."""

    def __init__(self, process: asyncio.subprocess.Process, control: socket.socket, directory: Path) -> None:
        self._process, self._control = process, control
        self._listens = True
        self.directory = directory

    @classmethod
    async def start(cls) -> "_Launcher":
        directory = Path(tempfile.mkdtemp(prefix="sandbox-"))
        os.chmod(directory, 0o711)  # noqa: PTH101, S103 - jobs' users must get through; it takes no time
        lock = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
        fcntl.flock(lock, fcntl.LOCK_EX)
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        ours.setblocking(False)
        try:
            process = await asyncio.create_subprocess_exec(
                *(sys.executable, "-I", "-S", str(LAUNCHER), str(theirs.fileno()), str(lock), str(directory)),
                stdin=asyncio.subprocess.DEVNULL,
                pass_fds=[theirs.fileno(), lock],
                start_new_session=True,
                cwd="/",
                env={},  # nothing of ours in anybody's /proc/…/environ
            )
        except BaseException:
            ours.close()
            shutil.rmtree(directory, ignore_errors=True)
            raise
        finally:
            theirs.close()
            os.close(lock)
        return cls(process, ours, directory)

    @property
    def alive(self) -> bool:
        return self._listens and self._process.returncode is None

    def launch(self, config: Path, descriptors: list[int]) -> None:
        try:
            socket.send_fds(self._control, [str(config).encode()], descriptors)
        except ConnectionError as error:  # it has ended, which asyncio will know in a moment
            self._listens = False
            raise _NotLaunchedError(str(error)) from error
        except OSError as error:
            raise SandboxError(f"the launcher does not listen: {error}") from error

    async def close(self) -> None:
        """Its shims end their programs when their channels close; it waits for them and clears up."""
        self._control.close()
        try:
            async with asyncio.timeout(STOP_SECONDS):
                await self._process.wait()
        except TimeoutError:
            log.warning("the launcher takes its time to end")


class _Job:
    """One program, from here: its output and the channel to its shim. Closing the channel ends the program."""

    def __init__(self, root: Path, on_output: OnOutput) -> None:
        self.stdout, self.stderr = _Output("stdout", on_output), _Output("stderr", on_output)
        self._config = root / "config.json"
        self._reading: list[asyncio.Task[None]] = []
        self._pipes: list[asyncio.BaseTransport] = []

    async def start(self, launcher: _Launcher) -> None:
        self._channel, told = socket.socketpair()
        self._channel.setblocking(False)
        theirs: list[int] = []
        try:
            for output in (self.stdout, self.stderr):
                ours, descriptor = os.pipe()
                theirs.append(descriptor)
                await self._listen(output, ours)
            launcher.launch(self._config, [*theirs, told.fileno()])
        except BaseException:
            self._close()
            raise
        finally:
            told.close()
            for descriptor in theirs:
                os.close(descriptor)

    async def _listen(self, output: _Output, descriptor: int) -> None:
        reader = asyncio.StreamReader()
        pipe, _ = await asyncio.get_running_loop().connect_read_pipe(
            lambda: asyncio.StreamReaderProtocol(reader), os.fdopen(descriptor, "rb", 0)
        )
        self._pipes.append(pipe)
        self._reading.append(asyncio.create_task(output.read(reader)))

    async def until_end(self) -> dict[str, Any]:
        """What the shim tells. It has killed all that could still write, so the output ends too."""
        try:
            raw = await self._told()
            await asyncio.wait(self._reading, timeout=STOP_SECONDS)
        except BaseException:
            await self._stop()
            raise
        finally:
            self._close()
        if not raw:
            raise SandboxError("the launcher was killed")
        told: dict[str, Any] = json.loads(raw)
        if "error" in told:
            raise SandboxError(f"{told['error']} {self.stderr.text[-200:]}".strip())
        return told

    async def _told(self) -> bytes:
        raw = b""
        while part := await asyncio.get_running_loop().sock_recv(self._channel, CHUNK):
            raw += part
        return raw

    async def _stop(self) -> None:
        """The shim sees it, kills all that is below it, removes the directory and ends."""
        self._channel.shutdown(socket.SHUT_WR)
        try:
            async with asyncio.timeout(STOP_SECONDS):
                await self._told()
        except (TimeoutError, ConnectionError):
            log.warning("a cancelled program takes its time to end")

    def _close(self) -> None:
        for task in self._reading:
            task.cancel()
        for pipe in self._pipes:
            pipe.close()
        self._channel.close()


def _config(root: Path, program: Program, tier: Tier, uid: int | None, python: Language) -> dict[str, Any]:
    language, limits, work = program.language, program.limits, root / "work"
    home, temporary = (BWRAP_HOME, "/tmp") if tier.bubblewrap else (str(work), str(work))  # noqa: S108 - its own
    return {
        "work": str(work),
        "directory": str(work),
        "stdin": str(root / "stdin") if program.stdin else os.devnull,
        "command": [*language.command, *language.options(limits.memory_mb), language.file, *program.args],
        "environment": {
            "PATH": "/usr/local/bin:/usr/bin:/bin",
            "HOME": home,
            "TMPDIR": temporary,
            "LANG": "C.UTF-8",
        },
        "uid": uid,
        "namespaces": tier.namespaces,
        "rules": [] if tier.bubblewrap else _rules(root, language),
        "bubblewrap": _bubblewrap(root, {language.command[0], python.command[0]}) if tier.bubblewrap else [],
        "inside": [python.command[0], "-I", "-S", BWRAP_INSIDE],
        "timeout": limits.timeout_seconds,
        "cpuSeconds": 2 * limits.timeout_seconds + 1,  # of each process; several threads use up more than the clock
        "memoryMb": limits.memory_mb,
        "addressSpaceMb": language.address_space_mb(limits.memory_mb),
        "processes": limits.processes,
        "fileMb": limits.file_mb,
        "diskMb": limits.disk_mb,
        "openFiles": limits.open_files,
    }


def _cgroup_config(top: Path | None, root: Path, limits: Limits) -> dict[str, Any]:
    if top is None:
        return {"cgroup": None}
    files = cgroups.limits(memory_mb=limits.memory_mb, processes=limits.processes)
    return {"cgroup": str(top / root.name), "cgroupLimits": files}


SYSTEM = ("/usr", "/bin", "/sbin", "/lib", "/lib32", "/lib64")
READABLE = ("/etc/ld.so.cache", "/etc/localtime", "/etc/alternatives", "/etc/ssl/openssl.cnf")  # node reads the last
DEVICES = tuple(f"/dev/{name}" for name in ("null", "zero", "full", "random", "urandom"))
BWRAP_PROGRAM = "/usr/bin/bwrap"
BWRAP_HOME, BWRAP_FILES, BWRAP_INSIDE = "/job/work", "/job/files", "/inside.py"
BWRAP_TEMPORARY_BYTES = 16 << 20
NAMESPACES = ("user", "pid", "net", "ipc", "uts", "cgroup-try")


def _prefixes(interpreters: Iterable[str]) -> list[str]:
    """Where interpreters are installed that do not come with the system."""
    found = {str(Path(interpreter).parent.parent) for interpreter in interpreters}
    return sorted(prefix for prefix in found if prefix != "/" and not Path(prefix).is_relative_to("/usr"))


def _rules(root: Path, language: Language) -> list[tuple[str, str]]:
    """What may be seen: the system's programs and libraries, harmless devices, and the job's own directory."""
    return [
        *((path, "read") for path in (*SYSTEM, *READABLE, *_prefixes(language.command[:1]))),
        *((path, "device") for path in DEVICES),
        (str(root / "files"), "look"),
        (str(root / "work"), "write"),
    ]


def _bubblewrap(root: Path, interpreters: Iterable[str]) -> list[str]:
    """The same view as a root directory of its own; the launcher adds the filter and what runs within."""
    command = [BWRAP_PROGRAM, *(f"--unshare-{space}" for space in NAMESPACES), "--disable-userns"]
    command += ["--die-with-parent", "--new-session", "--as-pid-1", "--cap-drop", "ALL", "--clearenv"]
    command += ["--hostname", "sandbox"]
    for path in SYSTEM:
        if Path(path).is_symlink():
            command += ["--symlink", str(Path(path).readlink()), path]
        else:
            command += ["--ro-bind-try", path, path]
    for path in (*READABLE, *_prefixes(interpreters)):
        command += ["--ro-bind-try", path, path]
    command += ["--dev", "/dev", "--remount-ro", "/dev", "--proc", "/proc"]
    command += ["--size", str(BWRAP_TEMPORARY_BYTES), "--tmpfs", "/tmp"]  # noqa: S108 - its own
    command += ["--ro-bind", str(INSIDE), BWRAP_INSIDE, "--ro-bind", str(root / "files"), BWRAP_FILES]
    return [*command, "--bind", str(root / "work"), BWRAP_HOME, "--chdir", BWRAP_HOME, "--remount-ro", "/"]


def _outcome(told: dict[str, Any], job: _Job, language: Language, tier: Tier) -> Outcome:
    if told["why"] == "disk":
        job.stderr.take("\n[killed: the disk limit was passed]\n")
    exhausted = told["exitCode"] != 0 and language.exhausted in job.stderr.text[-4096:]
    return Outcome(
        exit_code=told["exitCode"],
        signal=told["signal"],
        stdout=job.stdout.text,
        stderr=job.stderr.text,
        truncated=job.stdout.truncated or job.stderr.truncated,
        timed_out=told["why"] == "time" or told["signal"] == SIGXCPU,  # the same limit, in CPU time
        out_of_memory=told["why"] == "memory" or exhausted,
        duration_ms=told["durationMs"],
        max_rss_kb=told["maxRssKb"],
        sandbox=tier.name,
    )


# Each is given the worker's pid, a file of the worker's and one that is not there. It says "confined" when every door
# is shut, else which one is open. The other languages pass through the same doors.
SELF_TESTS = {
    "javascript": "console.log('confined')",
    "bash": "echo confined",
    "python": """
import os, socket, sys
worker, secret, written = sys.argv[1:]
def shut(what, door):
    try:
        door()
    except OSError:
        return
    raise SystemExit(what + " is open")
shut("network", lambda: socket.socket(socket.AF_INET, socket.SOCK_STREAM))
shut("unix sockets", lambda: socket.socket(socket.AF_UNIX, socket.SOCK_STREAM))
shut("host file", lambda: open("/etc/passwd"))
shut("the worker's file", lambda: open(secret))
shut("the worker's directory", lambda: open(written, "w"))
if int(worker) > 9:  # within a container it may have a number that the program's own processes have
    shut("the worker's environment", lambda: open(f"/proc/{worker}/environ"))
    shut("signal to the worker", lambda: os.kill(int(worker), 0))
shut("the given files", lambda: open("given", "a"))
assert open("given").read() == "given" and open("../files/given").read() == "given"
with open("here", "w") as file:
    file.write("here")
assert open("here").read() == "here" and not [k for k in os.environ if "SECRET" in k or "URL" in k]
print("confined")
""",
}
