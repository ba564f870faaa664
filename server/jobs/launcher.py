"""Runs one program confined: a program of its own, with the standard library only and nothing of ours.

``python -I -S launcher.py CONFIG STATUS_FD``. This process is the shim. It stays outside the confinement, forks
the program, watches time, memory and disk, and at the end (also when the worker dies or cancels: SIGTERM) kills
every process of the job and removes its directory. What happened is written to STATUS_FD as JSON.

The confinement, applied in the forked child in this order: namespaces (where allowed), a uid of its own (where
we are root), rlimits, no_new_privs, Landlock, seccomp. Landlock and seccomp must succeed, or nothing runs.
"""

import ctypes
import errno
import json
import os
import resource
import signal
import struct
import sys
import time

WATCH_SECONDS = 0.05
DISK_EVERY = 5  # watches
MOST_FILES = 10_000
LIBC = ctypes.CDLL(None, use_errno=True)

PR_SET_PDEATHSIG, PR_SET_NO_NEW_PRIVS, PR_SET_CHILD_SUBREAPER = 1, 38, 36
CLONE_NEWUSER, CLONE_NEWPID, CLONE_NEWNET, CLONE_NEWIPC, CLONE_NEWUTS = (
    0x10000000,
    0x20000000,
    0x40000000,
    0x08000000,
    0x04000000,
)
ANY_NAMESPACE = 0x7E020080  # CLONE_NEW{NS,CGROUP,UTS,IPC,USER,PID,NET} and CLONE_NEWTIME


class ConfinementError(Exception):
    pass


def check(result: int, what: str) -> int:
    if result < 0:
        raise ConfinementError(f"{what}: {os.strerror(ctypes.get_errno())}")
    return result


# Landlock (Documentation/userspace-api/landlock.rst)

LANDLOCK_CREATE, LANDLOCK_ADD, LANDLOCK_RESTRICT = 444, 445, 446  # the same on x86_64 and aarch64
FS_EXECUTE, FS_WRITE_FILE, FS_READ_FILE, FS_READ_DIR = 1, 2, 4, 8
FS_BITS = {1: 13, 2: 14, 3: 15, 4: 15, 5: 16}  # rights that each ABI knows
READ = FS_EXECUTE | FS_READ_FILE | FS_READ_DIR
DEVICE = FS_READ_FILE | FS_WRITE_FILE
FILE_ONLY = FS_EXECUTE | FS_WRITE_FILE | FS_READ_FILE | 1 << 14 | 1 << 15


def landlock_abi() -> int:
    return int(LIBC.syscall(LANDLOCK_CREATE, None, 0, 1))


def landlock(rules: "list[tuple[str, str]]") -> None:
    """Refuse every file but those beneath the given paths; refuse TCP, and signals to outsiders where known."""
    abi = check(landlock_abi(), "this kernel has no Landlock")
    all_rights = (1 << FS_BITS.get(abi, 16)) - 1
    attributes = struct.pack("=Q", all_rights)
    if abi >= 4:
        attributes += struct.pack("=Q", 3)  # bind and connect TCP
    if abi >= 6:
        attributes += struct.pack("=Q", 3)  # abstract sockets and signals: inside only
    ruleset = check(LIBC.syscall(LANDLOCK_CREATE, attributes, len(attributes), 0), "landlock_create_ruleset")
    for path, kind in rules:
        rights = {"read": READ, "device": DEVICE, "write": all_rights}[kind] & all_rights
        allow(ruleset, path, rights)
    check(LIBC.syscall(LANDLOCK_RESTRICT, ruleset, 0), "landlock_restrict_self")
    os.close(ruleset)


def allow(ruleset: int, path: str, rights: int) -> None:
    try:
        beneath = os.open(path, os.O_PATH | os.O_CLOEXEC)
    except FileNotFoundError:
        return
    if not os.path.isdir(path):
        rights &= FILE_ONLY
    try:
        rule = struct.pack("=Qi", rights, beneath)
        check(LIBC.syscall(LANDLOCK_ADD, ruleset, 1, rule, 0), f"landlock_add_rule {path}")
    finally:
        os.close(beneath)


# seccomp (linux/seccomp.h, linux/bpf_common.h)

X86_64, AARCH64 = 0xC000003E, 0xC00000B7
ALLOW, KILL, REFUSE = 0x7FFF0000, 0x80000000, 0x00050000
# name: (x86_64, aarch64); None where the architecture lacks it.
SYSCALLS = {
    "socket": (41, 198), "ptrace": (101, 117), "process_vm_readv": (310, 270), "process_vm_writev": (311, 271),
    "kcmp": (312, 272), "mount": (165, 40), "umount2": (166, 39), "pivot_root": (155, 41), "chroot": (161, 51),
    "unshare": (272, 97), "setns": (308, 268), "open_tree": (428, 428), "move_mount": (429, 429),
    "fsopen": (430, 430), "fsconfig": (431, 431), "fsmount": (432, 432), "fspick": (433, 433),
    "mount_setattr": (442, 442), "bpf": (321, 280), "perf_event_open": (298, 241), "userfaultfd": (323, 282),
    "io_uring_setup": (425, 425), "io_uring_enter": (426, 426), "io_uring_register": (427, 427),
    "add_key": (248, 217), "request_key": (249, 218), "keyctl": (250, 219), "init_module": (175, 105),
    "finit_module": (313, 273), "delete_module": (176, 106), "kexec_load": (246, 104), "kexec_file_load": (320, 294),
    "reboot": (169, 142), "swapon": (167, 224), "swapoff": (168, 225), "sethostname": (170, 161),
    "setdomainname": (171, 162), "iopl": (172, None), "ioperm": (173, None), "modify_ldt": (154, None),
    "acct": (163, 89), "quotactl": (179, 60), "open_by_handle_at": (304, 265), "name_to_handle_at": (303, 264),
    "fanotify_init": (300, 262), "settimeofday": (164, 170), "clock_settime": (227, 112), "clock_adjtime": (305, 266),
    "adjtimex": (159, 171), "syslog": (103, 116), "vhangup": (153, 58), "personality": (135, 92),
    "memfd_create": (319, 279), "memfd_secret": (447, 447), "shmget": (29, 194), "msgget": (68, 186),
    "semget": (64, 190), "mq_open": (240, 180), "chown": (92, None), "lchown": (94, None), "fchown": (93, 55),
    "fchownat": (260, 54), "setxattr": (188, 5), "lsetxattr": (189, 6), "fsetxattr": (190, 7),
    "pidfd_getfd": (438, 438), "pidfd_open": (434, 434), "pidfd_send_signal": (424, 424), "prlimit64": (302, 261),
    "process_madvise": (440, 440), "set_mempolicy": (238, 237), "migrate_pages": (256, 238), "move_pages": (279, 239),
}  # fmt: skip
# Landlock does not see these, so where the uid is shared with others they are refused too.
SHARED_UID = {
    "chmod": (90, None), "fchmod": (91, 52), "fchmodat": (268, 53), "fchmodat2": (452, 452), "utime": (132, None),
    "utimes": (235, None), "futimesat": (261, None), "utimensat": (280, 88), "setpriority": (141, 140),
    "sched_setaffinity": (203, 122), "sched_setscheduler": (144, 119), "sched_setparam": (142, 118),
    "sched_setattr": (314, 274), "ioprio_set": (251, 30),
}  # fmt: skip
SIGNALLING = {"kill": (62, 129), "tkill": (200, 130), "tgkill": (234, 131), "rt_sigqueueinfo": (129, 138),
              "rt_tgsigqueueinfo": (297, 240)}  # fmt: skip
CLONE, CLONE3, IOCTL = (56, 220), (435, 435), (16, 29)
TIOCSTI, TIOCLINUX = 0x5412, 0x541C
LOAD, JUMP_EQUAL, JUMP_SET, JUMP_GE, RETURN = 0x20, 0x15, 0x45, 0x35, 0x06
NUMBER, ARCHITECTURE, ARGUMENT0, ARGUMENT1 = 0, 4, 16, 24


def seccomp(*, shared_uid: bool, refuse_signals: bool) -> None:
    """Refuse (EPERM) what no program of a user needs and what could reach outside."""
    machine = os.uname().machine
    column = {"x86_64": 0, "aarch64": 1}.get(machine)
    if column is None:
        raise ConfinementError(f"no seccomp filter for {machine}")
    refused = dict(SYSCALLS)
    if shared_uid:
        refused.update(SHARED_UID)
    if refuse_signals:
        refused.update(SIGNALLING)
    numbers = sorted(number for pair in refused.values() if (number := pair[column]) is not None)
    program = filter_program(numbers, column)
    code = b"".join(struct.pack("=HBBI", *instruction) for instruction in program)
    buffer = ctypes.create_string_buffer(code, len(code))
    filter = struct.pack("@HxxxxxxP", len(program), ctypes.addressof(buffer))
    check(LIBC.prctl(22, 2, filter, 0, 0), "seccomp")


def filter_program(numbers: "list[int]", column: int) -> "list[tuple[int, int, int, int]]":
    refuse, nothing = REFUSE | errno.EPERM, REFUSE | errno.ENOSYS
    program = [
        (LOAD, 0, 0, ARCHITECTURE),
        (JUMP_EQUAL, 1, 0, (X86_64, AARCH64)[column]),
        (RETURN, 0, 0, KILL),
        (LOAD, 0, 0, NUMBER),
    ]
    if column == 0:  # the x32 ABI would pass all numbers by
        program += [(JUMP_GE, 0, 1, 0x40000000), (RETURN, 0, 0, KILL)]
    for number in numbers:
        program += [(JUMP_EQUAL, 0, 1, number), (RETURN, 0, 0, refuse)]
    program += [(JUMP_EQUAL, 0, 1, CLONE3[column]), (RETURN, 0, 0, nothing)]
    program += [
        (JUMP_EQUAL, 0, 3, CLONE[column]),
        (LOAD, 0, 0, ARGUMENT0),
        (JUMP_SET, 0, 1, ANY_NAMESPACE),
        (RETURN, 0, 0, refuse),
        (LOAD, 0, 0, NUMBER),
        (JUMP_EQUAL, 0, 4, IOCTL[column]),
        (LOAD, 0, 0, ARGUMENT1),
        (JUMP_EQUAL, 1, 0, TIOCSTI),
        (JUMP_EQUAL, 0, 1, TIOCLINUX),
        (RETURN, 0, 0, refuse),
        (RETURN, 0, 0, ALLOW),
    ]
    return program


# The child


def limit(config: dict) -> None:
    megabyte = 1 << 20
    limits = {
        resource.RLIMIT_CPU: config["timeout"] + 1,
        resource.RLIMIT_AS: config["addressSpaceMb"] * megabyte,
        resource.RLIMIT_FSIZE: config["fileMb"] * megabyte,
        resource.RLIMIT_NOFILE: config["openFiles"],
        resource.RLIMIT_NPROC: config["processes"],
        resource.RLIMIT_STACK: 8 * megabyte,
        resource.RLIMIT_CORE: 0,
        resource.RLIMIT_MEMLOCK: 0,
        resource.RLIMIT_MSGQUEUE: 0,
    }
    for what, value in limits.items():
        hard = resource.getrlimit(what)[1]
        value = value if hard == resource.RLIM_INFINITY else min(value, hard)
        resource.setrlimit(what, (value, value))


def confine(config: dict) -> None:
    """In the child; what remains to be done is exec."""
    os.umask(0o077)
    os.chdir(config["directory"])
    if config["uid"] is not None:
        os.setgroups([])
        os.setresgid(config["uid"], config["uid"], config["uid"])
        os.setresuid(config["uid"], config["uid"], config["uid"])
    # The uid's change clears it. The shim outlives all; should it be killed all the same, so are we.
    LIBC.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    limit(config)
    check(LIBC.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0), "no_new_privs")
    landlock([tuple(rule) for rule in config["rules"]])
    shared = config["uid"] is None
    seccomp(shared_uid=shared, refuse_signals=shared and not config["ownPids"] and landlock_abi() < 6)


def become_program(config: dict, ready: int) -> None:
    try:
        confine(config)
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGPIPE, signal.SIGXFSZ):
            signal.signal(number, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_SETMASK, [])
        os.execve(config["command"][0], config["command"], config["environment"])
    except BaseException as error:  # noqa: BLE001 - it is told, and nothing has run
        os.write(ready, f"{type(error).__name__}: {error}".encode()[:1000])
    finally:
        os._exit(125)


def own_namespaces() -> bool:
    """Of processes, network and IPC, where the kernel lets us; whether it did. Forks go into the new one."""
    spaces = CLONE_NEWPID | CLONE_NEWNET | CLONE_NEWIPC | CLONE_NEWUTS
    uid, gid = os.getuid(), os.getgid()
    if uid == 0:
        return bool(LIBC.unshare(spaces) == 0)
    if LIBC.unshare(spaces | CLONE_NEWUSER) != 0:
        return False
    for name, line in (("setgroups", "deny"), ("uid_map", f"{uid} {uid} 1"), ("gid_map", f"{gid} {gid} 1")):
        with open(f"/proc/self/{name}", "w") as file:
            file.write(line)
    return True


def start(config: dict) -> "tuple[int, int]":
    """The pid of the program, or of its init where it has pids of its own, and a pipe for its status.

    Namespaces are made in a child, which then ends: the shim itself must stay able to fork.
    """
    status, report = os.pipe()
    ready, refused = os.pipe()
    born, birth = os.pipe()
    wait, adopted = os.pipe()
    child = os.fork()
    if child == 0:
        for descriptor in (status, ready, born, adopted):
            os.close(descriptor)
        begin(config, birth, wait, refused, report)
    for descriptor in (refused, report, birth, wait):
        os.close(descriptor)
    told = os.read(born, 8)
    init = struct.unpack("=q", told)[0] if len(told) == 8 else 0
    if init:
        os.waitpid(child, 0)
        child = init  # ours by now: we are the subreaper
        os.write(adopted, b"!")
    os.close(adopted)
    config["ownPids"] = bool(init)
    problem = b""
    while part := os.read(ready, 1000):  # ends when exec closes the other end
        problem += part
    for descriptor in (born, ready):
        os.close(descriptor)
    if problem:
        raise ConfinementError(problem.decode(errors="replace"))
    return child, status


def begin(config: dict, birth: int, wait: int, refused: int, report: int) -> None:
    """In the first child: become the program, or make the init of new namespaces and end."""
    config["ownPids"] = config["namespaces"] and own_namespaces()
    if not config["ownPids"]:
        if config["uid"] is None:
            # The limit counts all processes of the uid: leave room for those that are there already.
            config["processes"] += processes_of(os.getuid())
        os.write(birth, struct.pack("=q", 0))
        become_program(config, refused)
    init = os.fork()
    if init:
        os.write(birth, struct.pack("=q", init))
        os._exit(0)
    # Until our parent is gone and the shim has adopted us: the death signal asked for now would be this parent's.
    os.read(wait, 1)
    os.close(wait)
    act_as_init(config, refused, report)


def act_as_init(config: dict, refused: int, report: int) -> None:
    """Process 1 of the namespace: reaps, tells how the program ended, and ends with everything in it."""
    LIBC.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    child = os.fork()
    if child == 0:
        os.close(report)
        become_program(config, refused)
    os.close(refused)
    for descriptor in (0, 1, 2):  # or a reader of the output would wait for us
        os.close(descriptor)
    while True:
        pid, status, usage = os.wait4(-1, 0)
        if pid == child:
            os.write(report, struct.pack("=iq", status, usage.ru_maxrss))
            os._exit(0)


# The shim


def processes_of(uid: int) -> int:
    count = 0
    for pid in filter(str.isdigit, os.listdir("/proc")):
        try:
            if os.stat(f"/proc/{pid}").st_uid == uid:
                count += len(os.listdir(f"/proc/{pid}/task"))
        except OSError:
            continue
    return count


def descendants() -> "list[int]":
    """Pids below this process, children first; daemons too, for we are their subreaper."""
    found, ahead = [], [os.getpid()]
    while ahead:
        pid = ahead.pop()
        try:
            with open(f"/proc/{pid}/task/{pid}/children") as file:
                children = [int(child) for child in file.read().split()]
        except OSError:
            children = []
        found += children
        ahead += children
    return found


def memory_of(pids: "list[int]") -> int:
    """Resident bytes."""
    pages = 0
    for pid in pids:
        try:
            with open(f"/proc/{pid}/statm") as file:
                pages += int(file.read().split()[1])
        except (OSError, IndexError):
            continue
    return pages * resource.getpagesize()


def proportional_memory_of(pids: "list[int]") -> int:
    """Resident bytes, shared pages divided among those who share them: exact, and slower."""
    total = 0
    for pid in pids:
        try:
            with open(f"/proc/{pid}/smaps_rollup") as file:
                total += next(int(line.split()[1]) << 10 for line in file if line.startswith("Pss:"))
        except (OSError, StopIteration):
            continue
    return total


def disk_exceeded(directory: str, most_bytes: int) -> bool:
    size, files, ahead = 0, 0, [directory]
    while ahead:
        try:
            with os.scandir(ahead.pop()) as entries:
                for entry in entries:
                    files += 1
                    size += entry.stat(follow_symlinks=False).st_blocks * 512
                    if entry.is_dir(follow_symlinks=False):
                        ahead.append(entry.path)
                    if files > MOST_FILES or size > most_bytes:
                        return True
        except OSError:
            continue
    return False


def kill_all() -> None:
    """Kill and reap until nothing is left; first no more forks, so that a fork bomb cannot outrun us."""
    while True:
        pids = descendants()
        for pid in pids:
            try:
                resource.prlimit(pid, resource.RLIMIT_NPROC, (0, 0))
            except (OSError, ValueError):
                continue
        for pid in pids:
            try:
                os.kill(pid, signal.SIGKILL)
            except OSError:
                continue
        try:
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        except ChildProcessError:
            return
        time.sleep(0.001)


class Watch:
    """Waits for the end of the program, and brings it about where a limit is passed."""

    def __init__(self, config: dict, child: int, status: int) -> None:
        self.config, self.child, self.status = config, child, status
        self.began = time.monotonic()
        self.peak = 0
        self.why: str | None = None

    def until_end(self) -> "tuple[int, int]":
        """Wait status and peak kilobytes of the program."""
        ticks = 0
        pause = 0.002
        while True:
            ended = self.ended()
            if ended is not None:
                return ended
            self.why = self.passed_limit(ticks)
            if self.why:
                return signal.SIGKILL, 0
            time.sleep(pause)
            pause = min(pause * 1.5, WATCH_SECONDS)
            ticks += 1

    def ended(self) -> "tuple[int, int] | None":
        pid, status, usage = os.wait4(self.child, os.WNOHANG)
        if pid == 0:
            return None
        if not self.config["ownPids"]:
            return status, usage.ru_maxrss
        told = os.read(self.status, 12)
        return struct.unpack("=iq", told) if len(told) == 12 else (signal.SIGKILL, 0)

    def passed_limit(self, ticks: int) -> "str | None":
        if CANCELLED:
            return "cancelled"
        if time.monotonic() - self.began > self.config["timeout"]:
            return "time"
        pids = descendants()
        memory = memory_of(pids)
        if memory > self.config["memoryMb"] << 20:  # pages that forks share are counted once only here
            memory = min(memory, proportional_memory_of(pids))
        self.peak = max(self.peak, memory)
        if memory > self.config["memoryMb"] << 20:
            return "memory"
        if ticks % DISK_EVERY == 0 and disk_exceeded(self.config["directory"], self.config["diskMb"] << 20):
            return "disk"
        return None


CANCELLED: "list[bool]" = []


def run(config: dict) -> dict:
    began = time.monotonic()
    child, status = start(config)
    os.close(0)
    watch = Watch(config, child, status)
    try:
        ended, kilobytes = watch.until_end()
    finally:
        kill_all()
    return {
        "exitCode": os.WEXITSTATUS(ended) if os.WIFEXITED(ended) else None,
        "signal": os.WTERMSIG(ended) if os.WIFSIGNALED(ended) else None,
        "why": watch.why,
        "durationMs": round((time.monotonic() - began) * 1000),
        "maxRssKb": max(kilobytes, watch.peak >> 10),
        "ownPids": config["ownPids"],
    }


def remove(root: str) -> None:
    """``rm`` can remove trees of any depth; first the rights that the program may have taken away."""
    for command in (["/bin/rm", "-rf", root], ["/bin/chmod", "-R", "u+rwx", root], ["/bin/rm", "-rf", root]):
        if not os.path.lexists(root):
            return
        null = [(os.POSIX_SPAWN_OPEN, 2, "/dev/null", os.O_WRONLY, 0)]
        os.waitpid(os.posix_spawn(command[0], command, {}, file_actions=null), 0)


def main() -> None:
    signal.signal(signal.SIGTERM, lambda *_: CANCELLED.append(True))
    LIBC.prctl(PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)
    LIBC.prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    with open(sys.argv[1]) as file:
        config = json.load(file)
    if os.getppid() != config["worker"]:  # it died before we could ask to be told
        CANCELLED.append(True)
    try:
        outcome = run(config)
    except (ConfinementError, OSError) as error:
        outcome = {"error": str(error)}
    finally:
        remove(config["root"])
    os.write(int(sys.argv[2]), json.dumps(outcome).encode())


if __name__ == "__main__":
    main()
