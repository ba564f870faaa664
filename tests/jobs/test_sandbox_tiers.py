"""The selection of a tier: the best that works, never one that exposes the host; and the parts of a tier."""

import asyncio
import fcntl
import os
import re
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from uuid import uuid4

import pytest
import structlog.testing

from server.jobs import cgroups, launcher, launcher_client, tiers
from server.jobs.sandbox import Sandbox, SandboxError
from tests.devstack.pids import all_exited
from tests.timeouts import WAIT_TIMEOUT_SECONDS

BPF_JUMP = 5
HEADERS = {
    "x86_64": "/usr/include/x86_64-linux-gnu/asm/unistd_64.h",
    "aarch64": "/usr/include/asm-generic/unistd.h",
}


@pytest.fixture
async def best() -> AsyncIterator[Sandbox]:
    box = await Sandbox.detect()
    yield box
    await box.close()


async def test_best_working_tier_is_selected(best: Sandbox) -> None:
    assert best.tier in tiers.tiers_for_current_user()
    for better in tiers.tiers_for_current_user()[: tiers.tiers_for_current_user().index(best.tier)]:
        box = await Sandbox.detect([better])
        assert box.tier.name == "none"
        await box.close()


async def test_next_tier_is_selected_if_one_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiers, "BWRAP_PATH", "/nowhere/bwrap")
    box = await Sandbox.detect()
    assert box.tier in tiers.tiers_for_current_user()
    assert box.tier != tiers.BWRAP
    assert (await box.run("python", "print('confined')")).sandbox == box.tier.name
    await box.close()


async def test_tier_that_exposes_a_host_directory_is_not_selected(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiers, "SYSTEM_PATHS", (*tiers.SYSTEM_PATHS, "/etc"))  # exposes host files
    box = await Sandbox.detect()
    assert box.tier.name == "none"
    await box.close()


@pytest.mark.parametrize("tier", tiers.tiers_for_current_user(), ids=lambda tier: tier.name)
async def test_tier_that_leaks_a_descriptor_is_not_selected(
    tier: tiers.Tier, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    source, leak = (
        launcher_client.LAUNCHER.read_text(),
        "            os.dup2(1, 9)\n            run_child(config, report)",
    )
    assert source.count("            run_child(config, report)") == 1
    leaky = tmp_path / "launcher.py"
    leaky.write_text(source.replace("            run_child(config, report)", leak))
    monkeypatch.setattr(launcher_client, "LAUNCHER", leaky)
    with structlog.testing.capture_logs() as logs:
        box = await Sandbox.detect([tier])
    await box.close()
    assert box.languages == ()
    if not (tier.cgroup and cgroups.find_delegated_group() is None):  # else the tier was not tried
        assert "the worker's descriptors are open: [9]" in {entry.get("problem") for entry in logs}


async def test_nothing_runs_without_a_tier() -> None:
    box = await Sandbox.detect([])
    assert box.languages == ()
    with pytest.raises(SandboxError):
        await box.run("python", "print('unconfined')")
    await box.close()


async def test_tier_that_fails_later_does_not_run_programs_unconfined(
    best: Sandbox, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    proof = tmp_path / "ran"
    tmp_path.chmod(0o777)
    monkeypatch.setattr(tiers, "BWRAP_PATH", "/nowhere/bwrap")
    monkeypatch.setattr(tiers, "_landlock_rules", lambda *_: [("/proc/self/mem", "nonsense")])
    with pytest.raises(SandboxError):
        await best.run("python", f"open({str(proof)!r}, 'w')")
    assert not proof.exists()


async def test_a_closed_sandbox_leaves_no_process_and_no_directory() -> None:
    box = await Sandbox.detect()
    directory, pid = box._launcher.directory, box._launcher._process.pid
    assert directory.exists()
    await box.close()
    assert not directory.exists()
    assert not Path(f"/proc/{pid}").exists()


async def test_no_other_language_is_tried_if_python_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiers, "BWRAP_PATH", "/bin/false")
    with structlog.testing.capture_logs() as logs:
        box = await Sandbox.detect([tiers.BWRAP])
    assert {entry["language"] for entry in logs if entry["event"] == "sandbox self-test failed"} == {"python"}
    [entry] = [entry for entry in logs if entry["log_level"] != "debug"]
    assert entry["log_level"] == "warning"
    assert entry["problems"].keys() == {"bwrap"}
    await box.close()


async def test_error_of_a_failed_start_states_only_its_cause(monkeypatch: pytest.MonkeyPatch) -> None:
    box = await Sandbox.detect([tiers.LANDLOCK_UID if os.geteuid() == 0 else tiers.LANDLOCK])
    if not box.languages:
        pytest.skip("this machine does not support Landlock")
    monkeypatch.setattr(tiers, "_landlock_rules", lambda *_: [("/proc/self/mem", "nonsense")])
    with pytest.raises(SandboxError) as refused:
        await box.run("python", "print()")
    assert str(refused.value) == "KeyError: 'nonsense'"
    await box.close()


@pytest.mark.parametrize("tier", tiers.tiers_for_current_user(), ids=lambda tier: tier.name)
async def test_restrictive_umask_of_the_worker_hides_no_files(tier: tiers.Tier) -> None:
    default = await Sandbox.detect([tier])
    await default.close()
    before = os.umask(0o077)
    try:
        restricted = await Sandbox.detect([tier])
        assert restricted.languages == default.languages
        if restricted.languages:
            code = "print(open('a/b/deep').read(), open('top').read())"
            outcome = await restricted.run("python", code, files={"a/b/deep": b"down", "top": b"up"})
            assert outcome.stdout == "down up\n"
    finally:
        os.umask(before)
    await restricted.close()


WORK = """
import asyncio, sys, structlog
from server.jobs.sandbox import Sandbox
structlog.configure(logger_factory=structlog.PrintLoggerFactory(sys.stderr))
async def work():
    async with (await Sandbox.detect([])).temporary_directory() as folder:
        (folder / "data").write_text("of a team")
        print(folder, flush=True)
        await asyncio.sleep(60)
asyncio.run(work())
"""


def test_temporary_directory_of_a_killed_worker_is_removed(tmp_path: Path) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", WORK], stdout=subprocess.PIPE, text=True, env={**os.environ, "TMPDIR": str(tmp_path)}
    ) as worker:
        assert worker.stdout is not None
        folder = Path(worker.stdout.readline().strip())
        assert (folder / "data").read_text() == "of a team"
        assert folder.is_relative_to(tmp_path)
        worker.kill()
    deadline = time.monotonic() + 10
    while list(tmp_path.iterdir()):
        assert time.monotonic() < deadline
        time.sleep(0.02)


async def test_next_worker_removes_the_directories_of_killed_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    with tempfile.TemporaryDirectory() as folder:
        monkeypatch.setattr(tempfile, "tempdir", folder)
        monkeypatch.setattr(launcher_client, "LAUNCHER", launcher_with_short_stale_age(Path(folder)))
        Path(folder).chmod(0o755)
        stale, in_use, foreign = (Path(folder, name) for name in ("sandbox-left", "sandbox-used", "precious"))
        for directory in (stale, in_use, foreign):
            (directory / "job-1" / "work").mkdir(parents=True)
        lock = os.open(in_use, os.O_RDONLY)
        fcntl.flock(lock, fcntl.LOCK_EX)
        await asyncio.sleep(0.1)
        box = await Sandbox.detect()
        assert box.languages
        os.close(lock)
        assert [directory.exists() for directory in (stale, in_use, foreign)] == [False, True, True]
        await box.close()


def launcher_with_short_stale_age(folder: Path) -> Path:
    """Return a launcher with a short stale age.

    The age matters: a young directory may belong to a worker that has not locked it yet.
    """
    source = launcher_client.LAUNCHER.read_text()
    assert "MIN_STALE_SECONDS = 60.0" in source
    path = folder / "launcher.py"
    path.write_text(source.replace("MIN_STALE_SECONDS = 60.0", "MIN_STALE_SECONDS = 0.05"))
    return path


@pytest.fixture
def group() -> Iterator[Path]:
    """Create a control group, on any machine with cgroup v2, with or without its controllers."""
    tree = cgroups.find_mount_point()
    if tree is None or not os.access(tree, os.W_OK):
        pytest.skip("no writable cgroup v2: needs root outside of a container")
    top = tree / f"test-{uuid4().hex}"
    top.mkdir()
    yield top
    assert [path for path in top.iterdir() if path.is_dir()] == []
    top.rmdir()


async def test_control_group_contains_all_processes_of_a_program_and_is_removed_with_it(
    group: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cgroups, "prepare_delegated_group", lambda: group)
    if not set((group / "cgroup.controllers").read_text().split()) >= cgroups.REQUIRED_CONTROLLERS:
        monkeypatch.setattr(cgroups, "group_limits", lambda **_: {})
    else:
        (group / "cgroup.subtree_control").write_text("+memory +pids")
    box = await Sandbox.detect([tiers.BWRAP_CGROUP])
    assert box.tier.name == "bwrap-cgroup"
    started = asyncio.Event()
    code = "import os, time; os.fork() or os.setsid(); os.fork(); print('up', flush=True); time.sleep(60)"
    job = asyncio.create_task(box.run("python", code, on_output=lambda *_: started.set()))
    await started.wait()
    [program_group] = [path for path in group.iterdir() if path.is_dir()]
    processes = (program_group / "cgroup.procs").read_text().split()
    assert len(processes) >= 4  # those of the program, and those around it
    assert str(os.getpid()) not in processes
    job.cancel()
    await asyncio.wait([job])
    assert not program_group.exists()
    assert all_exited(map(int, processes), seconds=WAIT_TIMEOUT_SECONDS)
    await box.close()


def test_control_group_that_is_not_delegated_is_left_unchanged() -> None:
    delegated_group = cgroups.find_delegated_group()
    assert delegated_group is None or cgroups.prepare_delegated_group() == delegated_group


@pytest.mark.parametrize("machine", HEADERS)
def test_system_call_numbers_match_the_kernel_headers(machine: str) -> None:
    header = Path(HEADERS[machine])
    if not header.exists():
        pytest.skip("the kernel's headers are missing: apt-get install linux-libc-dev")
    text = re.sub(r"__NR3264_", "__NR_", header.read_text())
    kernel_numbers = {name: int(number) for name, number in re.findall(r"#define __NR_(\w+)\s+(\d+)", text)}
    column = launcher.MACHINES.index(machine)
    groups = (
        launcher.FORBIDDEN_SYSCALLS,
        launcher.NO_OP_SYSCALLS,
        launcher.OWN_PROCESS_SYSCALLS,
        launcher.SIGNAL_SYSCALLS,
    )
    numbers_here = {name: numbers[column] for group in groups for name, numbers in group.items()}
    numbers_here |= {
        name: getattr(launcher, name.upper())[column] for name in ("clone", "clone3", "socketpair", "ioctl", "mmap")
    }
    numbers_here |= {
        name: getattr(launcher, name.upper())[column] for name in ("fcntl", "prctl", "setpriority", "ioprio_set")
    }
    assert {
        name: kernel_numbers.get(name) for name in numbers_here if name in kernel_numbers or numbers_here[name] is None
    } == {name: number for name, number in numbers_here.items() if name in kernel_numbers or number is None}


def test_filter_is_within_its_size_limit_and_its_jumps_are_valid() -> None:
    code = launcher.build_filter(
        allow_truncate=False, shared_user_rules=launcher.shared_user_rules(signals_confined=False)
    )
    steps = list(struct.iter_unpack("=HBBI", code))
    assert len(steps) < 4096
    assert steps[-1][0] == launcher.RETURN
    jumps = [
        (index, max(if_true, if_false))
        for index, (kind, if_true, if_false, _) in enumerate(steps)
        if kind & 7 == BPF_JUMP
    ]
    assert len(jumps) > 100
    assert all(index + 1 + distance < len(steps) for index, distance in jumps)


def test_launcher_imports_only_the_standard_library() -> None:
    for program in (launcher_client.LAUNCHER, tiers.SANDBOX_CHILD):
        check = (
            f"import ast, sys; compile(open({str(program)!r}).read(), 'x', 'exec'); exec('import ' + ', '.join(sorted("
            f"{{n.name for node in ast.walk(ast.parse(open({str(program)!r}).read())) if isinstance(node, ast.Import) "
            "for n in node.names})))"
        )
        subprocess.run(["/usr/bin/env", "-i", os.path.realpath("/proc/self/exe"), "-I", "-S", "-c", check], check=True)
