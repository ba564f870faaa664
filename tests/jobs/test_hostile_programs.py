"""Hostile programs in every tier: their attacks fail, they end, and nothing of them remains."""

import contextlib
import os
import socket
import stat
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from uuid import uuid4

import pytest

from tests.devstack.pids import all_exited
from tests.jobs.conftest import Streams
from tests.jobs.runner import SECRET, Runner, processes_with, wait_until_no_process

# Prints a line per operation that succeeds; failures print nothing.
TRY = """
import ctypes, os, sys
libc = ctypes.CDLL(None, use_errno=True)
def attempt(name, operation):
    try:
        result = operation()
    except (OSError, ValueError, AttributeError, IndexError, TypeError):
        return
    print(name, repr(result)[:300])
def call(name, *arguments):
    def operation():
        result = getattr(libc, name)(*arguments)
        if result == -1:
            raise OSError(ctypes.get_errno(), name)
        return result
    attempt(name, operation)
def syscall(name, *arguments):
    def operation():
        result = libc.syscall(*arguments)
        if result == -1:
            raise OSError(ctypes.get_errno(), name)
        return result
    attempt(name, operation)
"""


@pytest.fixture
def word() -> str:
    """A word in the arguments of a program's processes, which identifies them."""
    return f"marker-{uuid4().hex}"


@pytest.fixture
def precious(runner: Runner) -> Iterator[Path]:
    """A file that the worker's user may change."""
    folder = runner.folder / f"of-the-worker-{uuid4().hex}"
    folder.mkdir()
    path = folder / "precious"
    path.write_text("gold")
    for owned in (folder, path):
        os.chown(owned, runner.uid, -1)
    yield path
    assert path.read_text() == "gold"
    assert [entry.name for entry in folder.iterdir()] == ["precious"]


@pytest.fixture
def bystander(runner: Runner) -> Iterator[int]:
    """An unrelated process of the worker's user."""
    process = subprocess.Popen(["/bin/sleep", "100"], user=runner.uid if os.geteuid() == 0 else None)
    yield process.pid
    assert process.poll() is None
    process.kill()
    process.wait()


def is_well(runner: Runner) -> bool:
    return runner.alive() and runner.run("print('hello')").stdout == "hello\n"


BOMBS = {
    "python": "import os\nwhile True:\n    try: os.fork()\n    except OSError: pass",
    "bash": "bomb() { bomb | bomb & }; bomb; while true; do :; done",
}


@pytest.mark.parametrize("language", BOMBS)
def test_a_fork_bomb_is_bounded_and_ends(runner: Runner, word: str, language: str) -> None:
    job = runner.start(BOMBS[language], language, args=[word], timeout_seconds=4, processes=32)
    while not processes_with(word):
        time.sleep(0.01)
    most = 0
    while count := len(processes_with(word)):
        most = max(most, count)
    outcome = job.result()
    assert 2 < most <= 32 + 3  # and their parents, whose arguments contain the word too
    assert outcome.timed_out or outcome.exit_code not in (None, 0) or outcome.signal
    assert wait_until_no_process(word)
    assert is_well(runner)


def test_threads_are_bounded_too(runner: Runner) -> None:
    code = """
import threading, time
started = 0
try:
    for _ in range(500):
        threading.Thread(target=time.sleep, args=(600,), daemon=True).start()
        started += 1
except RuntimeError:
    print(started < 64, flush=True)
import os; os._exit(0)
"""
    assert runner.run(code, processes=32, memory_mb=512).stdout == "True\n"


def test_an_endless_loop_in_many_processes_ends(runner: Runner, word: str) -> None:
    code = "import os\nfor _ in range(4): os.fork()\nwhile True: pass"
    assert runner.run(code, args=[word], timeout_seconds=1).timed_out
    assert wait_until_no_process(word)


def test_a_program_that_ignores_signals_ends(runner: Runner, word: str) -> None:
    code = """
import signal, time
for number in set(signal.Signals) - {signal.SIGKILL, signal.SIGSTOP}:
    signal.signal(number, signal.SIG_IGN)
while True: time.sleep(1)
"""
    assert runner.run(code, args=[word], timeout_seconds=1).timed_out
    assert wait_until_no_process(word)


def test_a_stopped_program_ends(runner: Runner, word: str) -> None:
    code = "import os, signal; os.fork(); os.kill(os.getpid(), signal.SIGSTOP)"
    assert runner.run(code, args=[word], timeout_seconds=1).timed_out
    assert wait_until_no_process(word)


def test_endless_output_does_not_fill_the_worker(runner: Runner) -> None:
    outcome = runner.run("while True: print('x' * 10_000)", timeout_seconds=4)
    assert outcome.timed_out
    assert outcome.truncated
    assert len(outcome.stdout) == 1 << 20
    resident = Path(f"/proc/{runner.pid}/statm").read_text().split()[1]
    assert int(resident) * 4096 < 300 << 20
    assert is_well(runner)


def test_one_file_cannot_grow_past_its_limit(runner: Runner) -> None:
    code = """
with open("big", "wb") as file:
    try:
        while True: file.write(bytes(1 << 20))
    except OSError as error:
        print(error.strerror)
import os; print(os.stat("big").st_size <= 16 << 20)
"""
    assert runner.run(code).stdout == "File too large\nTrue\n"


FILLINGS = {
    "large files": "with open(name, 'wb') as file: file.write(bytes(8 << 20))",
    "small files": "open(name, 'w').close()",
    "directories": "os.mkdir(name); os.chdir(name) if number % 2 else None",
}


@pytest.mark.parametrize("filling", FILLINGS.values(), ids=list(FILLINGS))
def test_filling_the_disk_ends_the_program(runner: Runner, filling: str) -> None:
    code = f"import os\nnumber = 0\nwhile True:\n    number += 1; name = f'file-{{number}}'\n    {filling}"
    before = free_disk(runner)
    job = runner.start(code, memory_mb=256)
    lowest = before
    while job_runs(runner):
        lowest = min(lowest, free_disk(runner))
        time.sleep(0.02)
    outcome = job.result()
    assert "disk limit" in outcome.stderr or outcome.exit_code == 1  # or the program failed with an error of its own
    assert not outcome.timed_out
    assert before - lowest < 2 << 30
    assert not list(runner.folder.rglob("job-*"))
    assert is_well(runner)


def free_disk(runner: Runner) -> int:
    status = os.statvfs(runner.folder)
    return status.f_bavail * status.f_frsize


def job_runs(runner: Runner) -> bool:
    time.sleep(0.1)
    return any(runner.folder.rglob("config.json"))


BLOCKS = """
import mmap, os, sys, time
mine = os.path.abspath("main.py")
def blocks():
    for number in range(10):
        file = os.open(f"block-{number}", os.O_RDWR | os.O_CREAT, 0o600)
        os.write(file, bytes(8 << 20))
        yield file
        os.unlink(f"block-{number}")
"""
HIDDEN_BLOCKS = {
    "without a name": "kept = list(blocks())",
    "mapped, without a descriptor": """
import ctypes
libc = ctypes.CDLL(None)
for file in blocks():
    assert libc.mmap(None, 4096, 1, mmap.MAP_SHARED, file, 0) != -1
    os.close(file)
""",
    "by a thread alone, the first has ended": """
import ctypes, threading
def keep():
    time.sleep(0.2)
    kept = list(blocks())
    time.sleep(600)
threading.Thread(target=keep).start()
ctypes.CDLL(None).pthread_exit(None)
""",
    "by threads that end at once": """
import ctypes, threading
def hand_on():
    while True:
        try: return threading.Thread(target=hand_on).start()
        except RuntimeError: time.sleep(0.001)
kept = list(blocks())
hand_on()
ctypes.CDLL(None).pthread_exit(None)
""",
    "by a program that may not be read": """
if not sys.argv[1:]:
    copy = os.open("copy", os.O_WRONLY | os.O_CREAT, 0o100)
    os.write(copy, open(sys.executable, "rb").read())
    os.close(copy)
    os.execv("copy", ["copy", "-I", "-S", mine, "again"])
kept = list(blocks())
""",
}


@pytest.mark.parametrize("hiding", HIDDEN_BLOCKS.values(), ids=list(HIDDEN_BLOCKS))
def test_deleted_files_count_toward_the_disk_limit(runner: Runner, hiding: str) -> None:
    outcome = runner.run(f"{BLOCKS}{hiding}\ntime.sleep(600)", memory_mb=256)
    assert "disk limit" in outcome.stderr, outcome
    assert not outcome.timed_out


HIDDEN_MEMORY = {
    "in what another thread forked": """
import threading
def fork():
    if os.fork() == 0:
        data = os.urandom(1 << 20) * 62
        time.sleep(600)
    os.wait()  # else another thread would inherit them
threading.Thread(target=fork).start()
""",
    "in a process whose first thread has ended": """
import ctypes, threading
def fill():
    data = os.urandom(1 << 20) * 62
    time.sleep(600)
threading.Thread(target=fill).start()
ctypes.CDLL(None).pthread_exit(None)
""",
    "in socket pairs": """
import socket
for _ in range(12):
    if os.fork() == 0: break
kept = [socket.socketpair() for _ in range(28)]
for end in (end for pair in kept for end in pair):
    end.setblocking(False)
    try:
        while True: end.send(bytes(4096))
    except OSError: pass
""",
    "shared, and no longer mapped": """
import ctypes
libc = ctypes.CDLL(None)
libc.mmap.restype = ctypes.c_void_p
zero = os.open("/dev/zero", os.O_RDWR)
for _ in range(4):
    at = libc.mmap(None, 30 << 20, 3, 1, zero, 0)
    libc.memset(ctypes.c_void_p(at), 1, 30 << 20)
    libc.munmap(ctypes.c_void_p(at + 4096), (30 << 20) - 4096)
""",
}


@pytest.mark.parametrize("hiding", HIDDEN_MEMORY.values(), ids=list(HIDDEN_MEMORY))
def test_hidden_memory_counts_toward_the_limit(runner: Runner, hiding: str) -> None:
    outcome = runner.run(f"import os, time\n{hiding}\ntime.sleep(600)", memory_mb=64)
    assert outcome.out_of_memory, outcome
    assert outcome.signal == 9  # the program did not notice the limit itself
    assert not outcome.timed_out


def test_kernel_memory_cannot_be_acquired(runner: Runner) -> None:
    code = f"""{TRY}
import array, fcntl, mmap, socket
left, right = socket.socketpair()
read, write = os.pipe()
for name in ("SO_SNDBUF", "SO_RCVBUF", "SO_ATTACH_FILTER"):
    attempt(name, lambda: left.setsockopt(socket.SOL_SOCKET, getattr(socket, name, 26), 1 << 20))
attempt("a descriptor on its way", lambda: socket.send_fds(left, [b"x"], [read]))
attempt("a large pipe", lambda: fcntl.fcntl(write, fcntl.F_SETPIPE_SZ, 1 << 20))
buffer = mmap.mmap(-1, 4096, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
vector = (ctypes.c_uint64 * 2)(ctypes.addressof(ctypes.c_char.from_buffer(buffer)), 4096)
call("vmsplice", write, ctypes.byref(vector), 1, 0)
call("splice", os.open("main.py", os.O_RDONLY), None, write, None, 10, 0)
attempt("shared memory", lambda: mmap.mmap(-1, 4096))
stack = ctypes.addressof(ctypes.create_string_buffer(4096)) + 2048
syscall("a thread with files of its own", 56, 0x10000 | 0x800 | 0x100, ctypes.c_void_p(stack), None, None, None)
syscall("rules", 444, ctypes.byref((ctypes.c_uint64 * 2)(0, 1)), 16, 0)
"""
    assert nothing_done(runner, code)


def test_common_uses_of_descriptors_work(runner: Runner) -> None:
    code = """
import asyncio, multiprocessing, shutil, subprocess
async def cat():
    it = await asyncio.create_subprocess_exec("cat", stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    print((await it.communicate(b"piped"))[0])
shutil.copyfile("main.py", "copy")
subprocess.run(["cp", "copy", "another"], check=True)
print(open("another").read() == open("main.py").read())
asyncio.run(cat())
ours, theirs = multiprocessing.Pipe()
process = multiprocessing.get_context("fork").Process(target=theirs.send, args=("sent",))
process.start()
print(ours.recv())
process.join()
"""
    outcome = runner.run(code)
    assert (outcome.stdout, outcome.stderr) == ("True\nb'piped'\nsent\n", "")


def test_common_uses_of_descriptors_work_in_javascript(runner: Runner, node: str) -> None:
    code = """
const { execFileSync, fork } = require('child_process'), fs = require('fs')
if (process.argv[2]) return process.send('from below', () => process.disconnect())
fs.copyFileSync('main.js', 'copy')
const same = fs.readFileSync('copy').equals(fs.readFileSync('main.js'))
console.log(execFileSync('cat', { input: 'piped' }).toString(), same)
fork('main.js', ['again']).on('message', (text) => console.log(text))
fs.promises.readFile('copy').then(() => console.log(new Int8Array(new SharedArrayBuffer(1 << 20)).length))
"""
    outcome = runner.run(code, "javascript", memory_mb=256)
    assert sorted(outcome.stdout.splitlines()) == ["1048576", "from below", "piped true"], outcome


def test_programs_yield_to_the_worker(runner: Runner) -> None:
    outcome = runner.run("import os; print(os.nice(0)); os.nice(-1)")
    assert int(outcome.stdout) >= 10
    assert outcome.exit_code == 1


# Tries to write, truncate and read every open descriptor above 2.
DESCRIPTORS = """
import fcntl, os
for number in range(3, 1 << 16):
    try: kind = os.fstat(number)
    except OSError: continue
    print("open:", number, kind)
    fcntl.fcntl(number, fcntl.F_SETFL, os.O_NONBLOCK)
    for access in (lambda: os.write(number, b"FORGED"), lambda: os.ftruncate(number, 0), lambda: os.read(number, 100)):
        try: print("done:", number, access())
        except OSError: pass
"""
# These interpreters open descriptors of their own; device and inode show whether one is the worker's.
IDENTITIES = {
    "bash": "exec 3</dev/zero; stat -L -c %d:%i /proc/self/fd/{3..254} 2>/dev/null",
    "javascript": """
const fs = require('fs')
for (let number = 3; number < 4096; number++)
    try { const { dev, ino } = fs.fstatSync(number); console.log(`${dev}:${ino}`) } catch (error) { }
""",
}
TERMINALS = """
import os, sys
streams = [f"/proc/{pid}/fd/{number}" for pid in (1, int(sys.argv[1])) if pid != os.getpid() for number in range(3)]
for path in ("/dev/tty", "/dev/console", *(f"/dev/pts/{number}" for number in range(5)), *streams):
    try: open(path, "wb", 0).write(b"FORGED")
    except OSError: continue
    print("written:", path)
"""


def test_a_program_cannot_reach_the_terminal_the_pipe_or_the_log_of_its_worker(
    exposed_runner: Runner, streams: Streams
) -> None:
    before = streams.written()
    assert exposed_runner.run(DESCRIPTORS).stdout == ""
    for language in IDENTITIES.keys() & set(exposed_runner.languages):
        identities = set(exposed_runner.run(IDENTITIES[language], language).stdout.split())
        assert identities
        assert not identities & particular_files_of(exposed_runner.pid)
    assert exposed_runner.run(TERMINALS, args=[str(exposed_runner.pid)]).stdout == ""
    assert b"FORGED" not in streams.written()
    if streams.kind == "file":
        assert b"an honest line" in before
        assert os.fstat(streams.descriptor).st_size >= len(before)


def particular_files_of(pid: int) -> set[str]:
    """Return device and inode of the open files, terminals, pipes and sockets of a process.

    Event counters and the null device are omitted: unrelated processes share their inodes.
    """
    statuses = []
    for path in Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):  # closed since the directory was listed
            statuses.append(path.stat())
    null = Path(os.devnull).stat().st_rdev
    return {
        f"{status.st_dev}:{status.st_ino}"
        for status in statuses
        if stat.S_IFMT(status.st_mode) and status.st_rdev != null
    }


DAEMONS = {
    "double fork": "os.fork() and os._exit(0); os.setsid(); os.fork() and os._exit(0)",
    "new session": "os.fork() and os._exit(0); os.setsid()",
    "closed descriptors": "os.fork() and os._exit(0); os.setsid(); os.closerange(0, 256)",
    "another name": "os.fork() and os._exit(0); os.setsid();"
    "os.execv('/bin/sleep', ['[kworker/0:0] ' + sys.argv[1], '60'])",
    "no parent death signal, a subreaper": "import ctypes; prctl = ctypes.CDLL(None).prctl; prctl(36, 1, 0, 0, 0);"
    "os.fork() and os._exit(0); prctl(1, 0, 0, 0, 0); os.setsid()",
}


@pytest.mark.parametrize("detach", DAEMONS.values(), ids=list(DAEMONS))
def test_daemon_ends_with_its_program(runner: Runner, word: str, detach: str) -> None:
    code = f"""
import os, signal, sys, time
for number in (signal.SIGHUP, signal.SIGTERM, signal.SIGINT, signal.SIGCHLD):
    signal.signal(number, signal.SIG_IGN)
print("begun", flush=True)
{detach}
while True: time.sleep(1)
"""
    outcome = runner.run(code, args=[word])
    assert outcome.stdout == "begun\n"
    assert outcome.exit_code == 0
    assert not outcome.timed_out  # the program itself has exited
    assert wait_until_no_process(word)


def test_links_reach_no_host_files(runner: Runner, precious: Path) -> None:
    code = f"""{TRY}
for number, path in enumerate(("/etc/passwd", "/etc/shadow", "{precious}", "/proc/{runner.pid}/environ", "/root")):
    attempt("hard link", lambda: os.link(path, f"hard-{{number}}"))
    os.symlink(path, f"soft-{{number}}")
    attempt("symbolic link", lambda: open(f"soft-{{number}}", "rb").read())
    attempt("symbolic link, written", lambda: open(f"soft-{{number}}", "ab").write(b"x"))
    attempt("symbolic link, removed", lambda: os.truncate(f"soft-{{number}}", 0))
os.symlink("{precious.parent}", "folder")
attempt("through a folder", lambda: os.listdir("folder"))
attempt("through a folder", lambda: os.unlink("folder/precious"))
attempt("into a folder", lambda: os.rename("main.py", "folder/main.py"))
attempt("out of a folder", lambda: os.rename("folder/precious", "mine"))
"""
    assert nothing_done(runner, code)


def test_removal_follows_no_links(runner: Runner, precious: Path) -> None:
    code = f"""
import os
os.symlink("{precious.parent}", "folder")
os.mkdir("deep"); os.symlink("{precious.parent}", "deep/folder"); os.symlink("{precious}", "deep/precious")
"""
    assert runner.run(code).exit_code == 0
    assert not list(runner.folder.rglob("job-*"))
    assert precious.read_text() == "gold"


def test_removal_handles_deep_and_unreadable_directories(runner: Runner) -> None:
    code = """
import os
os.mkdir("closed"); open("closed/file", "w").close(); os.chmod("closed", 0)
for _ in range(1500):
    os.mkdir("d" * 100); os.chdir("d" * 100)
open("-rf", "w").close(); os.chmod(".", 0)
"""
    runner.run(code)
    assert not list(runner.folder.rglob("job-*"))


def test_environment_of_the_worker_is_hidden(runner: Runner) -> None:
    code = f"""
import glob, os, sys
seen = [repr(dict(os.environ))]
for path in glob.glob("/proc/*/environ") + glob.glob("/proc/*/task/*/environ") + glob.glob("/proc/*/cmdline"):
    try: seen.append(open(path).read())
    except OSError: pass
print([text for text in seen if "{SECRET}" in text or "WORKER_SECRET" in text or "tests.jobs.runner" in text])
print(sorted(set(os.environ) - {{"PATH", "HOME", "TMPDIR", "LANG", "LC_CTYPE", "PWD", "SHLVL", "_"}}))
"""
    outcome = runner.run(code)
    assert outcome.stdout == "[]\n[]\n", outcome


def test_other_processes_are_not_seen(runner: Runner, bystander: int) -> None:
    code = f"""{TRY}
for pid in ({runner.pid}, {bystander}, {os.getpid()}):
    for name in ("cmdline", "environ", "maps", "mem", "fd", "root", "cwd", "stat"):
        attempt(f"/proc/{{pid}}/{{name}}", lambda: os.listdir(f"/proc/{{pid}}/{{name}}"))
        attempt(f"/proc/{{pid}}/{{name}}", lambda: open(f"/proc/{{pid}}/{{name}}", "rb").read(100))
attempt("too many", lambda: [pid for pid in os.listdir("/proc") if pid.isdigit()][4])
"""
    assert nothing_done(runner, code)


def test_the_kernels_settings_cannot_be_written(runner: Runner) -> None:
    code = f"""{TRY}
for path in ("/proc/sys/kernel/hostname", "/proc/sys/vm/drop_caches", "/proc/sysrq-trigger", "/proc/self/oom_score_adj",
             "/sys/fs/cgroup/cgroup.procs", "/sys/kernel/mm/ksm/run", "/dev/mem", "/dev/kmsg", "/dev/sda", "/dev/vda"):
    attempt(path, lambda: os.write(os.open(path, os.O_WRONLY), b"-999"))
"""
    assert nothing_done(runner, code)


def test_network_is_unavailable(runner: Runner) -> None:
    folder = runner.folder / f"sockets-{uuid4().hex}"
    folder.mkdir(mode=0o777)
    folder.chmod(0o777)
    with contextlib.ExitStack() as open_sockets:

        def listening(family: int, kind: int, address: tuple[str, int] | str) -> socket.socket:
            sock = open_sockets.enter_context(socket.socket(family, kind))
            sock.bind(address)
            sock.setblocking(False)
            if kind == socket.SOCK_STREAM:
                sock.listen()
            return sock

        tcp = listening(socket.AF_INET, socket.SOCK_STREAM, ("127.0.0.1", 0))
        udp = listening(socket.AF_INET, socket.SOCK_DGRAM, ("127.0.0.1", 0))
        named = listening(socket.AF_UNIX, socket.SOCK_STREAM, str(folder / "stream"))
        posted = listening(socket.AF_UNIX, socket.SOCK_DGRAM, str(folder / "datagram"))
        abstract = listening(socket.AF_UNIX, socket.SOCK_STREAM, f"\0{folder.name}")
        for path in ("stream", "datagram"):
            (folder / path).chmod(0o777)
        code = f"""{TRY}
import socket
for family in (socket.AF_UNIX, socket.AF_INET, socket.AF_INET6, socket.AF_NETLINK, socket.AF_PACKET, 40):
    for kind in (socket.SOCK_STREAM, socket.SOCK_DGRAM, socket.SOCK_RAW, socket.SOCK_SEQPACKET):
        attempt("socket", lambda: socket.socket(family, kind))
attempt("tcp", lambda: socket.create_connection({tcp.getsockname()!r}, 1))
attempt("dns", lambda: socket.getaddrinfo("example.org", 80))
for kind in (socket.SOCK_DGRAM, socket.SOCK_SEQPACKET):
    attempt("pair", lambda: socket.socketpair(socket.AF_UNIX, kind)[0].sendto(b"x", "{folder}/datagram"))
left, right = socket.socketpair()
attempt("pair", lambda: left.sendto(b"x", "{folder}/datagram"))
attempt("pair", lambda: left.connect("{folder}/stream"))
attempt("pair", lambda: left.sendmsg([b"x"], [], 0, {udp.getsockname()!r}))
"""
        assert nothing_done(runner, code)
        for sock in (tcp, named, abstract):
            with pytest.raises(BlockingIOError):
                sock.accept()
        for sock in (udp, posted):
            with pytest.raises(BlockingIOError):
                sock.recv(10)


def test_event_loops_work(runner: Runner) -> None:
    assert runner.run("import asyncio; asyncio.run(asyncio.sleep(0)); print('looped')").stdout == "looped\n"


def test_files_of_the_host_are_not_seen(runner: Runner, precious: Path) -> None:
    code = f"""{TRY}
for path in ("/etc/passwd", "/etc/shadow", "/etc/hostname", "/root", "/home", "/var", "/opt", "/srv", "/run", "/boot",
             "/mnt", "/sys", "/var/log", "{precious}", "{precious.parent}", "{Path(__file__)}", "{Path.cwd()}",
             "../config.json", "../../secret", "../stdin"):
    attempt(path, lambda: os.listdir(path))
    attempt(path, lambda: open(path, "rb").read(100))
for path in ("{precious}", "{precious.parent}/other", "/usr/bin/other", "/etc/other", "/other", "/var/tmp/other",
             "/dev/other", "/dev/shm/other", "/job/other", "../other", "../files/other", "/sandbox_child.py"):
    attempt(f"write {{path}}", lambda: open(path, "a"))
    attempt(f"mkdir {{path}}", lambda: os.mkdir(path))
for change in (os.unlink, os.rmdir, lambda path: os.truncate(path, 0), lambda path: os.rename(path, "mine")):
    attempt("{precious}", lambda: change("{precious}"))
for change in (os.utime, lambda path: os.chmod(path, 0o777), lambda path: os.chown(path, os.getuid(), -1)):
    try: change("{precious}")
    except OSError: pass
"""
    before = precious.stat()
    assert nothing_done(runner, code)
    assert precious.stat().st_ctime_ns == before.st_ctime_ns  # mode, times and owner are unchanged


def test_temporary_files_do_not_reach_the_host(runner: Runner) -> None:
    name = f"left-{uuid4().hex}"
    code = f"{TRY}\nfor at in ('/tmp', '/var/tmp', '/dev/shm'): attempt(at, lambda: open(at + '/{name}', 'w'))"
    runner.run(code)
    assert not [at for at in ("/tmp", "/var/tmp", "/dev/shm") if Path(at, name).exists()]


def test_memory_file_systems_are_bounded(runner: Runner) -> None:
    code = """
import os
written = 0
for number in range(64):
    try:
        with open(f"/tmp/{number}", "wb") as file: written += file.write(bytes(1 << 20))
    except OSError: break
print(written <= 16 << 20)
"""
    assert runner.run(code).stdout == "True\n"


def test_signals_reach_no_process_outside(runner: Runner, bystander: int) -> None:
    code = f"""{TRY}
import signal
for pid in ({runner.pid}, {bystander}, {os.getpid()}, 1, os.getppid()):
    for number in (signal.SIGTERM, signal.SIGKILL, signal.SIGSTOP, signal.SIGINT):
        try: os.kill(pid, number)
        except OSError: pass
        try: os.killpg(pid, number)
        except OSError: pass
    attempt("priority", lambda: os.setpriority(os.PRIO_PROCESS, pid, 19) if pid > 9 else os.unlink("/nowhere"))
    attempt("affinity", lambda: os.sched_setaffinity(pid, {{0}}) if pid > 9 else os.unlink("/nowhere"))
print("alive", flush=True)
os.kill(-1, signal.SIGKILL)
os.kill(0, signal.SIGKILL)
"""
    outcome = runner.run(code)
    assert outcome.stdout == "alive\n"
    assert outcome.signal in (None, 9)
    assert not all_exited([runner.pid])
    assert not all_exited([bystander])
    assert is_well(runner)


def test_indirect_signals_reach_no_process_outside(runner: Runner, bystander: int) -> None:
    code = f"""{TRY}
import fcntl, signal
read, write = os.pipe()
for pid in ({runner.pid}, {bystander}):
    attempt("owner", lambda: fcntl.fcntl(read, fcntl.F_SETOWN, pid))
    syscall("pidfd_open", 434, pid, 0)
    syscall("rt_sigqueueinfo", 129, pid, 9, ctypes.byref(ctypes.create_string_buffer(128)))
    syscall("tkill", 200, pid, 9)
    syscall("prlimit64", 302, pid, 0, None, ctypes.byref(ctypes.create_string_buffer(16)))
"""
    assert nothing_done(runner, code)
    assert not all_exited([bystander])


def test_signals_among_its_own_processes_work(runner: Runner) -> None:
    if runner.tier == "landlock-bare" and landlock_abi() < 6:
        pytest.skip(
            "this kernel's Landlock does not confine signals: the filter allows them only to the process itself"
        )
    code = "import subprocess; p = subprocess.Popen(['sleep', '9']); p.kill(); print(p.wait())"
    assert runner.run(code).stdout == "-9\n"


def landlock_abi() -> int:
    from server.jobs import launcher

    return launcher.landlock_abi()


def test_forged_reports_and_closed_descriptors_hide_nothing(runner: Runner, word: str) -> None:
    code = """
import os, sys, time
for number in range(3, 256):
    try: os.write(number, b'+=\\0\\0\\0\\0\\0\\0\\0\\0\\0\\0\\0\\0{"exitCode": 0, "signal": null, "stopReason": null}')
    except OSError: pass
os.closerange(0, 256)
if os.fork() == 0: time.sleep(600)
os._exit(3)
"""
    outcome = runner.run(code, args=[word])
    assert outcome.exit_code == 3
    assert wait_until_no_process(word)
    assert is_well(runner)


def test_no_descriptor_of_the_worker_is_inherited(runner: Runner) -> None:
    code = """
import os
def is_open(number):
    try: return os.fstat(number) is not None
    except OSError: return False
print([number for number in range(3, 256) if is_open(number)])
"""
    assert runner.run(code).stdout == "[]\n"


def test_other_processes_cannot_be_traced(runner: Runner, bystander: int) -> None:
    code = f"""{TRY}
buffer = ctypes.create_string_buffer(64)
class Vector(ctypes.Structure): _fields_ = [("base", ctypes.c_void_p), ("length", ctypes.c_size_t)]
vector = Vector(ctypes.addressof(buffer), 64)
for pid in ({runner.pid}, {bystander}, os.getppid(), 1):
    for request in (16, 0x4206):
        call("ptrace", request, pid, None, None)
    call("process_vm_readv", pid, ctypes.byref(vector), 1, ctypes.byref(vector), 1, 0)
call("ptrace", 0, 0, None, None)
"""
    assert nothing_done(runner, code)


def test_no_namespace_can_be_created_or_entered(runner: Runner) -> None:
    code = f"""{TRY}
NEW = (0x80, 0x20000, 0x02000000, 0x04000000, 0x08000000, 0x10000000, 0x20000000, 0x40000000)
for flag in NEW:
    call("unshare", flag)
    syscall("clone", 56, flag | 17, None, None, None, None)
arguments = (ctypes.c_uint64 * 11)(0x10000000, 0, 0, 0, 17)
syscall("clone3", 435, ctypes.byref(arguments), 88)
call("mount", b"none", b"/tmp", b"tmpfs", 0, None)
call("umount2", b"/proc", 2)
call("chroot", b".")
call("pivot_root", b".", b".")
for name in ("user", "mnt", "pid", "net"):
    attempt("setns", lambda: libc.setns(os.open(f"/proc/1/ns/{{name}}", os.O_RDONLY), 0) + 1 or os.unlink("/nowhere"))
syscall("io_uring_setup", 425, 8, ctypes.byref(ctypes.create_string_buffer(120)))
syscall("bpf", 321, 0, None, 0)
syscall("keyctl", 250, 0, -3, 1)
syscall("add_key", 248, b"user", b"x", b"y", 1, -3)
syscall("memfd_create", 319, b"x", 0)
syscall("userfaultfd", 323, 0)
syscall("perf_event_open", 298, None, 0, -1, -1, 0)
syscall("personality", 135, 0x0040000)
"""
    assert nothing_done(runner, code)


def test_privileges_cannot_be_gained(runner: Runner) -> None:
    code = """
import ctypes, os, resource
print(ctypes.CDLL(None).prctl(39, 0, 0, 0, 0), end=" ")
for uid in (0, 1, 1000):
    try: os.setuid(uid); print("became", uid) if uid != os.getuid() or uid == 0 else None
    except OSError: pass
for what in (resource.RLIMIT_NPROC, resource.RLIMIT_FSIZE, resource.RLIMIT_CPU, resource.RLIMIT_NOFILE):
    soft, hard = resource.getrlimit(what)
    try: resource.setrlimit(what, (hard + 1, hard + 1)); print("raised", what)
    except (OSError, ValueError): pass
print("done")
"""
    assert runner.run(code).stdout == "1 done\n"


def test_other_programs_are_undisturbed_by_a_hostile_one(runner: Runner) -> None:
    bombs = [runner.start(BOMBS["python"], timeout_seconds=1) for _ in range(2)]
    time.sleep(0.3)
    assert runner.run("print('hello')").stdout == "hello\n"
    for bomb in bombs:
        bomb.result()


def test_a_program_sees_nothing_of_another(runner: Runner) -> None:
    other = runner.start("import time; open('secret', 'w').write('x'); print('up', flush=True); time.sleep(600)")
    other.wait_for_output()
    at = next(runner.folder.rglob("secret"), None) or Path("/nowhere")
    jobs = [path for path in runner.folder.rglob("job-*") if path.is_dir()]
    code = f"""{TRY}
for path in {[str(path) for path in jobs]}:
    attempt("look", lambda: os.listdir(path))
    attempt("look", lambda: os.listdir(path + "/work"))
    attempt("read", lambda: open(path + "/work/secret").read())
    attempt("code", lambda: open(path + "/work/main.py").read())
attempt("read", lambda: open("{at}").read())
"""
    assert len(jobs) == 1
    assert nothing_done(runner, code)
    other.cancel()


def test_a_killed_launcher_is_replaced_and_its_programs_end(own_runner: Runner, word: str) -> None:
    job = own_runner.start("import time; print('up', flush=True); time.sleep(600)", args=[word], timeout_seconds=60)
    job.wait_for_output()
    [launcher] = [pid for pid in processes_with("launcher.py") if parent_of(pid) == own_runner.pid]
    subprocess.run(["kill", "-9", str(launcher)], check=True)
    assert own_runner.run("print('hello')").stdout == "hello\n"
    job.cancel()
    assert wait_until_no_process(word)


def parent_of(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])


def nothing_done(runner: Runner, code: str) -> bool:
    """Run a program of attempts; assert that it ends and that none succeeds."""
    outcome = runner.run(code + "\nprint('that is all')")
    assert outcome.stderr == ""
    assert outcome.stdout == "that is all\n"
    return True
