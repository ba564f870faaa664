"""Which tier a worker gets: the best that holds, never none that lets a program out; and what a tier is made of."""

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

from server.jobs import cgroups, launcher, shims, tiers
from server.jobs.sandbox import Sandbox, SandboxError
from tests.devstack.pids import gone
from tests.patience import PATIENCE_SECONDS

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


async def test_the_best_tier_that_holds_is_taken(best: Sandbox) -> None:
    assert best.tier in tiers.ours()
    for better in tiers.ours()[: tiers.ours().index(best.tier)]:
        box = await Sandbox.detect([better])
        assert box.tier.name == "none"
        await box.close()


async def test_a_tier_that_does_not_hold_falls_to_the_next(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiers, "BWRAP_PROGRAM", "/nowhere/bwrap")
    box = await Sandbox.detect()
    assert box.tier in tiers.ours()
    assert box.tier != tiers.BWRAP
    assert (await box.run("python", "print('confined')")).sandbox == box.tier.name
    await box.close()


async def test_a_tier_with_a_door_open_is_not_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiers, "SYSTEM", (*tiers.SYSTEM, "/etc"))  # a view of too much
    box = await Sandbox.detect()
    assert box.tier.name == "none"
    await box.close()


@pytest.mark.parametrize("tier", tiers.ours(), ids=lambda tier: tier.name)
async def test_a_tier_that_lets_a_descriptor_through_is_not_taken(
    tier: tiers.Tier, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    source, leak = shims.LAUNCHER.read_text(), "            os.dup2(1, 9)\n            become(config, report)"
    assert source.count("            become(config, report)") == 1
    leaky = tmp_path / "launcher.py"
    leaky.write_text(source.replace("            become(config, report)", leak))
    monkeypatch.setattr(shims, "LAUNCHER", leaky)
    with structlog.testing.capture_logs() as logs:
        box = await Sandbox.detect([tier])
    await box.close()
    assert box.languages == ()
    if not (tier.cgroup and cgroups.find() is None):  # else it was not even tried
        assert "the worker's descriptors are open: [9]" in {each.get("problem") for each in logs}


async def test_without_a_tier_nothing_runs() -> None:
    box = await Sandbox.detect([])
    assert box.languages == ()
    with pytest.raises(SandboxError):
        await box.run("python", "print('unconfined')")
    await box.close()


async def test_a_tier_that_fails_later_refuses_and_does_not_run_unconfined(
    best: Sandbox, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    proof = tmp_path / "ran"
    tmp_path.chmod(0o777)
    monkeypatch.setattr(tiers, "BWRAP_PROGRAM", "/nowhere/bwrap")
    monkeypatch.setattr(tiers, "_rules", lambda *_: [("/proc/self/mem", "nonsense")])
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


async def test_where_python_does_not_hold_no_other_language_is_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiers, "BWRAP_PROGRAM", "/bin/false")
    with structlog.testing.capture_logs() as logs:
        box = await Sandbox.detect([tiers.BWRAP])
    assert {each["language"] for each in logs if each["event"] == "sandbox self-test"} == {"python"}
    [told] = [each for each in logs if each["log_level"] != "debug"]
    assert told["log_level"] == "warning"
    assert told["problems"].keys() == {"bwrap"}
    await box.close()


async def test_what_keeps_a_program_from_its_start_is_told_and_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    box = await Sandbox.detect([tiers.LANDLOCK_UID if os.geteuid() == 0 else tiers.LANDLOCK])
    if not box.languages:
        pytest.skip("this machine does not hold Landlock")
    monkeypatch.setattr(tiers, "_rules", lambda *_: [("/proc/self/mem", "nonsense")])
    with pytest.raises(SandboxError) as refused:
        await box.run("python", "print()")
    assert str(refused.value) == "KeyError: 'nonsense'"
    await box.close()


@pytest.mark.parametrize("tier", tiers.ours(), ids=lambda tier: tier.name)
async def test_a_careful_umask_of_the_workers_hides_nothing(tier: tiers.Tier) -> None:
    usual = await Sandbox.detect([tier])
    await usual.close()
    before = os.umask(0o077)
    try:
        careful = await Sandbox.detect([tier])
        assert careful.languages == usual.languages
        if careful.languages:
            code = "print(open('a/b/deep').read(), open('top').read())"
            outcome = await careful.run("python", code, files={"a/b/deep": b"down", "top": b"up"})
            assert outcome.stdout == "down up\n"
    finally:
        os.umask(before)
    await careful.close()


WORK = """
import asyncio, sys, structlog
from server.jobs.sandbox import Sandbox
structlog.configure(logger_factory=structlog.PrintLoggerFactory(sys.stderr))
async def work():
    async with (await Sandbox.detect([])).folder() as folder:
        (folder / "data").write_text("of a team")
        print(folder, flush=True)
        await asyncio.sleep(60)
asyncio.run(work())
"""


def test_what_a_killed_worker_worked_on_is_removed(tmp_path: Path) -> None:
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


async def test_what_killed_workers_left_is_cleared_by_the_next(monkeypatch: pytest.MonkeyPatch) -> None:
    with tempfile.TemporaryDirectory() as folder:
        monkeypatch.setattr(tempfile, "tempdir", folder)
        monkeypatch.setattr(shims, "LAUNCHER", impatient_launcher(Path(folder)))
        Path(folder).chmod(0o755)
        left, in_use, foreign = (Path(folder, name) for name in ("sandbox-left", "sandbox-used", "precious"))
        for each in (left, in_use, foreign):
            (each / "job-1" / "work").mkdir(parents=True)
        lock = os.open(in_use, os.O_RDONLY)
        fcntl.flock(lock, fcntl.LOCK_EX)
        await asyncio.sleep(0.1)
        box = await Sandbox.detect()
        assert box.languages
        os.close(lock)
        assert [each.exists() for each in (left, in_use, foreign)] == [False, True, True]
        await box.close()


def impatient_launcher(folder: Path) -> Path:
    """What is left must be old, or it might be somebody's who has not locked it yet."""
    source = shims.LAUNCHER.read_text()
    assert "STALE_SECONDS = 60.0" in source
    path = folder / "launcher.py"
    path.write_text(source.replace("STALE_SECONDS = 60.0", "STALE_SECONDS = 0.05"))
    return path


@pytest.fixture
def group() -> Iterator[Path]:
    """A control group that is ours, on any machine that has version 2 at all: with or without its controllers."""
    tree = cgroups.mount()
    if tree is None or not os.access(tree, os.W_OK):
        pytest.skip("no cgroup v2 that may be written: it takes root outside of a container")
    top = tree / f"test-{uuid4().hex}"
    top.mkdir()
    yield top
    assert [each for each in top.iterdir() if each.is_dir()] == []
    top.rmdir()


async def test_a_programs_control_group_holds_all_of_it_and_ends_with_it(
    group: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cgroups, "delegated", lambda: group)
    if not set((group / "cgroup.controllers").read_text().split()) >= cgroups.NEEDED:
        monkeypatch.setattr(cgroups, "limits", lambda **_: {})
    else:
        (group / "cgroup.subtree_control").write_text("+memory +pids")
    box = await Sandbox.detect([tiers.BWRAP_CGROUP])
    assert box.tier.name == "bwrap-cgroup"
    said = asyncio.Event()
    code = "import os, time; os.fork() or os.setsid(); os.fork(); print('up', flush=True); time.sleep(60)"
    job = asyncio.create_task(box.run("python", code, on_output=lambda *_: said.set()))
    await said.wait()
    [made] = [each for each in group.iterdir() if each.is_dir()]
    processes = (made / "cgroup.procs").read_text().split()
    assert len(processes) >= 4  # the program's, and what is around it
    assert str(os.getpid()) not in processes
    job.cancel()
    await asyncio.wait([job])
    assert not made.exists()
    assert gone(map(int, processes), seconds=PATIENCE_SECONDS)
    await box.close()


def test_a_control_group_that_nobody_delegated_is_left_alone() -> None:
    found = cgroups.find()
    assert found is None or cgroups.delegated() == found


@pytest.mark.parametrize("machine", HEADERS)
def test_the_numbers_of_system_calls_are_the_kernels(machine: str) -> None:
    header = Path(HEADERS[machine])
    if not header.exists():
        pytest.skip("the kernel's headers are missing: apt-get install linux-libc-dev")
    text = re.sub(r"__NR3264_", "__NR_", header.read_text())
    theirs = {name: int(number) for name, number in re.findall(r"#define __NR_(\w+)\s+(\d+)", text)}
    column = launcher.MACHINES.index(machine)
    groups = (launcher.FORBIDDEN, launcher.PRETENDED, launcher.ABOUT_A_PROCESS, launcher.SIGNALS)
    ours = {name: numbers[column] for group in groups for name, numbers in group.items()}
    ours |= {
        name: getattr(launcher, name.upper())[column] for name in ("clone", "clone3", "socketpair", "ioctl", "mmap")
    }
    ours |= {name: getattr(launcher, name.upper())[column] for name in ("fcntl", "prctl", "setpriority", "ioprio_set")}
    assert {name: theirs.get(name) for name in ours if name in theirs or ours[name] is None} == {
        name: number for name, number in ours.items() if name in theirs or number is None
    }


def test_the_filter_fits_and_its_jumps_lead_somewhere() -> None:
    code = launcher.filter_program(truncate=False, others=launcher.among_others(signals=False))
    steps = list(struct.iter_unpack("=HBBI", code))
    assert len(steps) < 4096
    assert steps[-1][0] == launcher.RETURN
    jumps = [(at, max(held, failed)) for at, (kind, held, failed, _) in enumerate(steps) if kind & 7 == BPF_JUMP]
    assert len(jumps) > 100
    assert all(at + 1 + far < len(steps) for at, far in jumps)


def test_the_launcher_needs_no_package() -> None:
    for program in (shims.LAUNCHER, tiers.INSIDE):
        check = (
            f"import ast, sys; compile(open({str(program)!r}).read(), 'x', 'exec'); exec('import ' + ', '.join(sorted("
            f"{{n.name for each in ast.walk(ast.parse(open({str(program)!r}).read())) if isinstance(each, ast.Import) "
            "for n in each.names})))"
        )
        subprocess.run(["/usr/bin/env", "-i", os.path.realpath("/proc/self/exe"), "-I", "-S", "-c", check], check=True)
