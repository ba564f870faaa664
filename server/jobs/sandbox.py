"""Where a team's programs run: no network, no sight of the host, bounded in everything, nothing left behind.

``launcher.py`` does the confining, in processes of its own; here it is chosen what to confine with, tested once at the
worker's start, and told of each program. It never falls back to running unconfined.
"""

import asyncio
import contextlib
import errno
import json
import os
import secrets
import shutil
import tempfile
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

import structlog

from server.jobs import cgroups, tiers
from server.jobs.programs import Language, Limits, Program, installed
from server.jobs.shims import Job, Launcher, NotLaunchedError, OnOutput, SandboxError
from server.jobs.tiers import NO_TIER, Tier

__all__ = ["FilesRefusedError", "Limits", "Outcome", "Sandbox", "SandboxError"]

log = structlog.get_logger()

LAUNCHES = 3
FIRST_UID, UIDS = 1_500_000_000, 1 << 26  # far from any user's
MOST_FILES, MOST_FILE_BYTES, LONGEST_PATH = 2_000, 32 << 20, 1024
IMPOSSIBLE = (errno.ENAMETOOLONG, errno.ENOTDIR, errno.EISDIR, errno.EEXIST)  # with such paths, today and tomorrow
SIGXCPU = 24


USUAL_LIMITS = Limits()
SELF_TEST_LIMITS = Limits(timeout_seconds=60, memory_mb=256)
SELF_TEST_ATTEMPTS = 3


class FilesRefusedError(Exception):
    """The files cannot be laid out: a path leads elsewhere, or they are too many."""


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


@dataclass
class Sandbox:
    tier: Tier
    _launcher: Launcher
    _cgroup: Path | None = None
    _languages: Mapping[str, Language] = field(default_factory=dict)
    _problem: str = ""  # of the last self-test that failed
    _starting: asyncio.Lock = field(default_factory=asyncio.Lock)

    @property
    def languages(self) -> tuple[str, ...]:
        return tuple(self._languages)

    @classmethod
    async def detect(cls, candidates: Sequence[Tier] | None = None) -> "Sandbox":
        """The best tier whose self-test holds, with the languages that run in it; a sandbox without languages
        where none does. To be closed."""
        launcher = await Launcher.start()
        problems: dict[str, str] = {}
        for tier in tiers.ours() if candidates is None else candidates:
            sandbox = cls(tier, launcher)
            problem = await sandbox._prepare()
            if problem is None:
                _log_choice(tier, problems)
                for name in ("javascript", "bash"):
                    await sandbox._learn(name)
                return sandbox
            problems[tier.name] = problem
        log.warning("no sandbox: programs are not run", problems=problems)
        return cls(NO_TIER, launcher)

    async def close(self) -> None:
        """No program is to run any more."""
        await self._launcher.close()

    @contextlib.asynccontextmanager
    async def folder(self) -> AsyncIterator[Path]:
        """A fresh directory for work of our own, removed afterwards; by the launcher where the worker is killed."""
        launcher = await self._living_launcher()
        made = Path(await asyncio.to_thread(tempfile.mkdtemp, prefix="child-", dir=launcher.directory))
        try:
            yield made
        finally:
            await _in_thread(shutil.rmtree, made, True)

    async def run(
        self,
        language: str,
        code: str,
        *,
        stdin: str = "",
        args: Sequence[str] = (),
        files: Mapping[str, bytes] | None = None,
        limits: Limits = USUAL_LIMITS,
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

    async def _prepare(self) -> str | None:
        """Return why the tier cannot be used here; None where it can, for Python at least."""
        if lack := tiers.missing(self.tier):
            return lack
        if self.tier.cgroup:
            self._cgroup = cgroups.delegated()
            if self._cgroup is None:
                return "no control group is delegated to the worker (cgroup v2): Delegate=yes in its systemd unit"
        return None if await self._learn("python") else f"its self-test fails: {self._problem}"

    async def _learn(self, name: str) -> bool:
        """Whether it speaks that language, by the first of its interpreters that works. Python comes first: it is
        around the others."""
        for language in installed():
            if language.name == name and await self._works(language):
                self._languages = {**self._languages, name: language}
                return True
        return False

    async def _works(self, language: Language) -> bool:
        """Whether a program runs in it and, for Python, finds every door shut. A loaded machine may kill or starve
        one that would: what holds once, holds."""
        for _ in range(SELF_TEST_ATTEMPTS):
            problem = await self._problem_of(language)
            if problem is None:
                return True
            self._problem = problem
            log.debug("sandbox self-test", tier=self.tier.name, language=language.name, problem=problem)
        return False

    async def _problem_of(self, language: Language) -> str | None:
        """Return what a self-test finds open or broken; None where it holds."""
        secret, written = self._launcher.directory / "secret", self._launcher.directory / "written"
        secret.write_text("secret")
        args = (str(os.getpid()), str(secret), str(written))
        program = Program(
            language, SELF_TESTS[language.name], args=args, files={"given": b"given"}, limits=SELF_TEST_LIMITS
        )
        try:
            outcome = await self._run(program, lambda *_: None)
        except SandboxError as error:
            return str(error)
        if outcome.stdout.strip() == "confined" and not written.exists():
            return None
        limit = "timed out" if outcome.timed_out else "out of memory" if outcome.out_of_memory else ""
        return limit or " ".join((outcome.stdout + outcome.stderr).split())[-200:] or f"signal {outcome.signal}"

    async def _run(self, program: Program, on_output: OnOutput) -> Outcome:
        for _ in range(LAUNCHES):
            launcher = await self._living_launcher()
            root = Path(tempfile.mkdtemp(prefix="job-", dir=launcher.directory))
            job = Job(root, on_output)
            try:
                await _in_thread(self._lay_out, root, program)
                await job.start(launcher)
                told = await job.until_end()
            except BaseException as error:
                await _in_thread(shutil.rmtree, root, True)
                if not isinstance(error, NotLaunchedError):
                    raise
            else:
                return _outcome(told, job, program.language, self.tier)
        raise SandboxError("the launcher ends again and again")

    async def _living_launcher(self) -> Launcher:
        async with self._starting:
            if not self._launcher.alive:
                log.warning("the launcher has ended; another is started")
                ended, self._launcher = self._launcher, await Launcher.start()
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
        if uid is not None:
            _show(files)
        code = work / program.language.file
        code.unlink(missing_ok=True)  # a file of that name is still to be had in ../files
        code.write_bytes(program.code.encode(errors="replace"))
        stdin = root / "stdin"
        stdin.write_bytes(program.stdin.encode(errors="replace"))
        for each in (work, code, stdin):
            os.chown(each, -1 if uid is None else uid, -1 if uid is None else uid)
        python = self._languages.get("python", program.language)
        config = tiers.config(root, program, self.tier, uid=uid, python=python, cgroup=self._cgroup)
        (root / "config.json").write_text(json.dumps(config))


def _log_choice(tier: Tier, problems: Mapping[str, str]) -> None:
    """Log once which tier was chosen, and what the better ones lack: the nearest first, and each reason once."""
    nearest = {problem: name for name, problem in problems.items()}
    better = "; ".join(f"{name}: {problem}" for problem, name in reversed(nearest.items()))
    log.info("sandbox chosen", tier=tier.name, better=better or None)


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
            if error.errno not in IMPOSSIBLE:
                raise
            raise FilesRefusedError(f"{name[:100]!r}: {error.strerror}") from error
        top.add(parts[0])
    return top


def _show(directory: Path) -> None:
    """To another user, whatever our umask."""
    for folder, _, files in os.walk(directory):
        os.chmod(folder, 0o755)  # noqa: PTH101, S103
        for name in files:
            os.chmod(os.path.join(folder, name), 0o644)  # noqa: PTH101, PTH118


def _free_uid() -> int:
    """A user that owns nothing, of those that our user namespace has."""
    lines = Path("/proc/self/uid_map").read_text().splitlines()
    last = max(int(line.split()[0]) + int(line.split()[2]) for line in lines)
    span = min(UIDS, last // 2)
    return min(FIRST_UID, last - span) + secrets.randbelow(span)


def _outcome(told: dict[str, Any], job: Job, language: Language, tier: Tier) -> Outcome:
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
import os, socket, sys, time
worker, secret, written = sys.argv[1:]
def shut(what, door):
    try:
        door()
    except OSError:
        return
    raise SystemExit(what + " is open")
def is_open(descriptor):
    try:
        os.fstat(descriptor)
    except OSError:
        return False
    return True
# Those that were open before the limit of open files was lowered may have any number.
left = [descriptor for descriptor in range(3, 1 << 16) if is_open(descriptor)]
if left:
    raise SystemExit(f"the worker's descriptors are open: {left[:10]}")
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
time.sleep(0.2)  # the watch looks more than once, and must be able to
print("confined")
""",
}
