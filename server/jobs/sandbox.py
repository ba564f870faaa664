"""The sandbox for users' programs: no network, no access to the host, limits on every resource, nothing left behind.

``launcher.py`` confines the programs, in its own processes. This module selects the tier, tests it once at the start
of the worker, and passes each program to the launcher. It never falls back to an unconfined run.
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
from server.jobs.languages import Language, Program, ProgramLimits, installed_languages
from server.jobs.launcher_client import LauncherProcess, NotLaunchedError, OnOutput, RunningProgram, SandboxError
from server.jobs.tiers import NO_TIER, Tier

__all__ = ["FilesRejectedError", "ProgramLimits", "ProgramResult", "Sandbox", "SandboxError"]

log = structlog.get_logger()

MAX_LAUNCH_ATTEMPTS = 3
FIRST_UID, UID_COUNT = 1_500_000_000, 1 << 26  # far from the uids of real users
MAX_INPUT_FILES, MAX_INPUT_BYTES, MAX_PATH_BYTES = 2_000, 32 << 20, 1024
# The path itself is at fault: a retry fails too.
INVALID_PATH_ERRNOS = (errno.ENAMETOOLONG, errno.ENOTDIR, errno.EISDIR, errno.EEXIST)
SIGXCPU = 24

DEFAULT_LIMITS = ProgramLimits()
SELF_TEST_LIMITS = ProgramLimits(timeout_seconds=60, memory_mb=256)
MAX_SELF_TEST_ATTEMPTS = 3


class FilesRejectedError(Exception):
    """The files cannot be written: a path is invalid, or the files exceed the limits."""


@dataclass(frozen=True)
class ProgramResult:
    """The result of a program, as the job's result shows it."""

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
    """A confinement tier, its launcher, and the languages that run in it."""

    tier: Tier
    _launcher: LauncherProcess
    _cgroup: Path | None = None
    _languages: Mapping[str, Language] = field(default_factory=dict)
    _self_test_failure: str = ""  # of the last self-test that failed
    _restart_lock: asyncio.Lock = field(default_factory=asyncio.Lock)

    @property
    def languages(self) -> tuple[str, ...]:
        return tuple(self._languages)

    @classmethod
    async def detect(cls, candidates: Sequence[Tier] | None = None) -> "Sandbox":
        """Return a sandbox of the best tier that passes its self-test, with the languages that run in it.

        If no tier passes, the sandbox has no languages. The caller closes it.
        """
        launcher = await LauncherProcess.start()
        problems: dict[str, str] = {}
        for tier in tiers.tiers_for_current_user() if candidates is None else candidates:
            sandbox = cls(tier, launcher)
            problem = await sandbox._check_tier()
            if problem is None:
                _log_selected_tier(tier, problems)
                for name in ("javascript", "bash"):
                    await sandbox._add_language(name)
                return sandbox
            problems[tier.name] = problem
        log.warning("no sandbox available", problems=problems)
        return cls(NO_TIER, launcher)

    async def close(self) -> None:
        """Stop the launcher; no program may run afterwards."""
        await self._launcher.close()

    @contextlib.asynccontextmanager
    async def temporary_directory(self) -> AsyncIterator[Path]:
        """Create a directory for a helper process, and remove it afterwards.

        The launcher removes it if the worker is killed.
        """
        launcher = await self._running_launcher()
        directory = Path(await asyncio.to_thread(tempfile.mkdtemp, prefix="child-", dir=launcher.directory))
        try:
            yield directory
        finally:
            await _run_in_thread(shutil.rmtree, directory, True)

    async def run(
        self,
        language: str,
        code: str,
        *,
        stdin: str = "",
        args: Sequence[str] = (),
        files: Mapping[str, bytes] | None = None,
        limits: ProgramLimits = DEFAULT_LIMITS,
        on_output: OnOutput = lambda *_: None,
    ) -> ProgramResult:
        """Run a program until it ends or exceeds a limit. Cancelling the call kills all its processes.

        The program can read ``files``, given by relative path, in ``../files``; those at the top level also appear
        under their names in the program's directory.

        Raises:
            SandboxError: the language cannot be confined here; nothing ran.
            FilesRejectedError: the files cannot be written.
        """
        if language not in self._languages:
            raise SandboxError(f"this worker has no sandbox for {language}")
        program = Program(self._languages[language], code, stdin, args, files or {}, limits)
        return await self._run(program, on_output)

    async def _check_tier(self) -> str | None:
        """Return why the tier cannot be used here, or None if it can, at least for Python."""
        if missing_package := tiers.missing_package(self.tier):
            return missing_package
        if self.tier.cgroup:
            self._cgroup = cgroups.prepare_delegated_group()
            if self._cgroup is None:
                return "no control group is delegated to the worker (cgroup v2): set Delegate=yes in its systemd unit"
        return None if await self._add_language("python") else f"self-test failed: {self._self_test_failure}"

    async def _add_language(self, name: str) -> bool:
        """Add a language by the first of its interpreters that passes the self-test; return whether one does.

        Python must be added first: its interpreter starts the programs of the other languages.
        """
        for language in installed_languages():
            if language.name == name and await self._passes_self_test(language):
                self._languages = {**self._languages, name: language}
                return True
        return False

    async def _passes_self_test(self, language: Language) -> bool:
        """Return whether a self-test program runs and, for Python, finds every access blocked.

        A single pass suffices: on a loaded machine, a correct sandbox may fail because its program is killed or slow.
        """
        for _ in range(MAX_SELF_TEST_ATTEMPTS):
            problem = await self._run_self_test(language)
            if problem is None:
                return True
            self._self_test_failure = problem
            log.debug("sandbox self-test failed", tier=self.tier.name, language=language.name, problem=problem)
        return False

    async def _run_self_test(self, language: Language) -> str | None:
        """Run the self-test; return what it finds open or broken, or None if it passes."""
        secret, written = self._launcher.directory / "secret", self._launcher.directory / "written"
        secret.write_text("secret")
        args = (str(os.getpid()), str(secret), str(written))
        program = Program(
            language, SELF_TEST_PROGRAMS[language.name], args=args, files={"given": b"given"}, limits=SELF_TEST_LIMITS
        )
        try:
            outcome = await self._run(program, lambda *_: None)
        except SandboxError as error:
            return str(error)
        if outcome.stdout.strip() == "confined" and not written.exists():
            return None
        limit = "timed out" if outcome.timed_out else "out of memory" if outcome.out_of_memory else ""
        return limit or " ".join((outcome.stdout + outcome.stderr).split())[-200:] or f"signal {outcome.signal}"

    async def _run(self, program: Program, on_output: OnOutput) -> ProgramResult:
        for _ in range(MAX_LAUNCH_ATTEMPTS):
            launcher = await self._running_launcher()
            root = Path(tempfile.mkdtemp(prefix="job-", dir=launcher.directory))
            running = RunningProgram(root, on_output)
            try:
                await _run_in_thread(self._write_job_directory, root, program)
                await running.start(launcher)
                outcome = await running.wait()
            except BaseException as error:
                await _run_in_thread(shutil.rmtree, root, True)
                if not isinstance(error, NotLaunchedError):
                    raise
            else:
                return _program_result(outcome, running, program.language, self.tier)
        raise SandboxError("the sandbox launcher exits repeatedly")

    async def _running_launcher(self) -> LauncherProcess:
        async with self._restart_lock:
            if not self._launcher.alive:
                log.warning("sandbox launcher exited, restarting")
                exited, self._launcher = self._launcher, await LauncherProcess.start()
                await exited.close()
            return self._launcher

    def _write_job_directory(self, root: Path, program: Program) -> None:
        """Write the job's directory: the launcher's configuration, stdin, the files, and the program in ``work``."""
        uid = _random_uid() if os.geteuid() == 0 else None
        root.chmod(0o711)
        work, files = root / "work", root / "files"
        work.mkdir(mode=0o700)
        files.mkdir(mode=0o755)
        for name in _write_files(program.files, files):
            (work / name).symlink_to(Path("..", "files", name))
        if uid is not None:
            _make_readable(files)
        code = work / program.language.file
        code.unlink(missing_ok=True)  # a file of that name is still available in ../files
        code.write_bytes(program.code.encode(errors="replace"))
        stdin = root / "stdin"
        stdin.write_bytes(program.stdin.encode(errors="replace"))
        for path in (work, code, stdin):
            os.chown(path, -1 if uid is None else uid, -1 if uid is None else uid)
        python = self._languages.get("python", program.language)
        config = tiers.launcher_config(root, program, self.tier, uid=uid, python=python, cgroup=self._cgroup)
        (root / "config.json").write_text(json.dumps(config))


def _log_selected_tier(tier: Tier, problems: Mapping[str, str]) -> None:
    """Log the selected tier, and why the better tiers fail: the next better first, each reason once."""
    tier_by_problem = {problem: name for name, problem in problems.items()}
    better = "; ".join(f"{name}: {problem}" for problem, name in reversed(tier_by_problem.items()))
    log.info("sandbox selected", tier=tier.name, better=better or None)


async def _run_in_thread(work: Callable[..., object], *arguments: object) -> None:
    """Run ``work`` in a thread to its end, even if cancelled: the caller must not continue while it is half done."""
    running = asyncio.ensure_future(asyncio.to_thread(work, *arguments))
    try:
        await asyncio.shield(running)
    except asyncio.CancelledError:
        await asyncio.wait({running})
        raise


def _write_files(files: Mapping[str, bytes], directory: Path) -> set[str]:
    """Write the files below a directory; return the names at its top level.

    Raises:
        FilesRejectedError: a path is invalid, or the files exceed the limits.
    """
    if len(files) > MAX_INPUT_FILES or sum(map(len, files.values())) > MAX_INPUT_BYTES:
        raise FilesRejectedError(f"the maximum is {MAX_INPUT_FILES} files and {MAX_INPUT_BYTES >> 20} MiB")
    top_names = set()
    for name, content in files.items():
        parts = PurePosixPath(name).parts
        if not parts or parts[0] == "/" or ".." in parts or "\0" in name or len(name.encode()) > MAX_PATH_BYTES:
            raise FilesRejectedError(f"invalid path: {name[:100]!r}")
        path = directory.joinpath(*parts)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
        except OSError as error:
            if error.errno not in INVALID_PATH_ERRNOS:
                raise
            raise FilesRejectedError(f"{name[:100]!r}: {error.strerror}") from error
        top_names.add(parts[0])
    return top_names


def _make_readable(directory: Path) -> None:
    """Make the tree readable for other users, whatever the umask."""
    for parent, _, files in os.walk(directory):
        os.chmod(parent, 0o755)  # noqa: PTH101, S103
        for name in files:
            os.chmod(os.path.join(parent, name), 0o644)  # noqa: PTH101, PTH118


def _random_uid() -> int:
    """Return a random uid of this user namespace that owns nothing."""
    lines = Path("/proc/self/uid_map").read_text().splitlines()
    last = max(int(line.split()[0]) + int(line.split()[2]) for line in lines)
    span = min(UID_COUNT, last // 2)
    return min(FIRST_UID, last - span) + secrets.randbelow(span)


def _program_result(outcome: dict[str, Any], running: RunningProgram, language: Language, tier: Tier) -> ProgramResult:
    if outcome["stopReason"] == "disk":
        running.stderr.append("\n[killed: the program exceeded its disk limit]\n")
    allocation_failed = outcome["exitCode"] != 0 and language.out_of_memory_text in running.stderr.text[-4096:]
    return ProgramResult(
        exit_code=outcome["exitCode"],
        signal=outcome["signal"],
        stdout=running.stdout.text,
        stderr=running.stderr.text,
        truncated=running.stdout.truncated or running.stderr.truncated,
        timed_out=outcome["stopReason"] == "time" or outcome["signal"] == SIGXCPU,  # the same limit, in CPU time
        out_of_memory=outcome["stopReason"] == "memory" or allocation_failed,
        duration_ms=outcome["durationMs"],
        max_rss_kb=outcome["maxRssKb"],
        sandbox=tier.name,
    )


# Each program receives the worker's pid, a file of the worker and one that does not exist. It prints "confined" if
# every access is blocked, else which one is open. The other languages run under the same restrictions as Python.
SELF_TEST_PROGRAMS = {
    "javascript": "console.log('confined')",
    "bash": "echo confined",
    "python": """
import os, socket, sys, time
worker, secret, written = sys.argv[1:]
def expect_blocked(name, access):
    try:
        access()
    except OSError:
        return
    raise SystemExit(name + " is open")
def is_open(descriptor):
    try:
        os.fstat(descriptor)
    except OSError:
        return False
    return True
# Descriptors opened before the limit of open files was lowered may have any number.
leaked = [descriptor for descriptor in range(3, 1 << 16) if is_open(descriptor)]
if leaked:
    raise SystemExit(f"the worker's descriptors are open: {leaked[:10]}")
expect_blocked("network", lambda: socket.socket(socket.AF_INET, socket.SOCK_STREAM))
expect_blocked("unix sockets", lambda: socket.socket(socket.AF_UNIX, socket.SOCK_STREAM))
expect_blocked("host file", lambda: open("/etc/passwd"))
expect_blocked("the worker's file", lambda: open(secret))
expect_blocked("the worker's directory", lambda: open(written, "w"))
if int(worker) > 9:  # in a container, one of the program's own processes may have the same pid
    expect_blocked("the worker's environment", lambda: open(f"/proc/{worker}/environ"))
    expect_blocked("signal to the worker", lambda: os.kill(int(worker), 0))
expect_blocked("the given files", lambda: open("given", "a"))
assert open("given").read() == "given" and open("../files/given").read() == "given"
with open("here", "w") as file:
    file.write("here")
assert open("here").read() == "here" and not [k for k in os.environ if "SECRET" in k or "URL" in k]
time.sleep(0.2)  # the watchdog samples more than once, and must be able to
print("confined")
""",
}
