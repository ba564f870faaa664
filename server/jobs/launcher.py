"""The sandbox launcher: runs programs confined. It uses only the standard library, and no module of the server.

``python -I -S launcher.py CONTROL LOCK DIRECTORY`` starts once per worker, so that no job waits for an interpreter.
LOCK is a descriptor that locks DIRECTORY, which holds the directories of jobs, until the launcher and its shims have
exited. CONTROL is a socket: a message is the path of a job's ``config.json`` and carries three descriptors: the
program's stdout and stderr, and the channel on which the launcher reports the outcome as JSON. For each message the
launcher forks a *shim*. The shim stays outside the confinement, forks the program, and watches time, memory and disk.
At the end it kills every process of the job and removes its directory. If the worker closes its end of the channel, by
a cancellation or because it exits, the shim ends the program too.

The forked child sets up the restrictions: namespaces, its own user (if the launcher is root), rlimits, no new
privileges, Landlock and seccomp; or bubblewrap in place of namespaces and Landlock, with ``sandbox_child.py`` in it.
Every restriction of a tier must be in force, or nothing runs.
"""

import ctypes
import errno
import fcntl
import gc
import json
import os
import resource
import select
import signal
import socket
import stat
import struct
import sys
import time
from collections.abc import Iterable

WATCH_INTERVAL_SECONDS = 0.05
DISK_CHECK_BACKOFF = 10  # disk checks take at most a tenth of the time
MAX_SCANNED_FILES = 10_000
MAX_MAPPINGS = 1 << 16
MAX_CGROUP_REMOVAL_ATTEMPTS = 200
MAX_CONTROL_MESSAGE_BYTES = 4096
MIN_STALE_SECONDS = 60.0
MEGABYTE = 1 << 20
NICE = 10  # else programs that only compute would keep the worker from renewing its leases
MAX_PIPE_BYTES, MAX_SOCKET_BYTES = 64 << 10, 208 << 10  # the kernel's maximum for one, by default
WRITE_BUFFER_SETTING = "/proc/sys/net/core/wmem_default"
SHARED_MEMORY_PATH = b"/dev/zero"  # the kernel's name for shared anonymous memory
LIBC = ctypes.CDLL(None, use_errno=True)

PR_SET_PDEATHSIG, PR_SET_DUMPABLE, PR_SET_SECCOMP, PR_SET_CHILD_SUBREAPER, PR_SET_NO_NEW_PRIVS = 1, 4, 22, 36, 38
# Messages on a program's status pipe: the program has an init that reports its exit, or has none; a restriction failed;
# the program exited.
STATUS_HAS_INIT, STATUS_NO_INIT, STATUS_FAILED, STATUS_EXITED = b"+", b"-", b"!", b"="
STATUS_LAUNCHED = b"\n"  # on the channel, before the outcome: JSON ignores the white space
EXIT_STATUS = struct.Struct("<iq")  # wait status, peak kilobytes


class ConfinementError(Exception):
    """A restriction cannot be set up; the program must not start."""


def check_syscall(result: int, name: str) -> int:
    if result < 0:
        raise ConfinementError(f"{name}: {os.strerror(ctypes.get_errno())}")
    return result


CLOSE_RANGE = 436  # close_range(2), Linux 5.9; the same on x86_64 and aarch64
LAST_DESCRIPTOR = 0xFFFFFFFF


def close_descriptors_except(*kept: int) -> None:
    """Close every descriptor above 2 that is not in ``kept``."""
    first = 3
    for descriptor in (*sorted(kept), LAST_DESCRIPTOR + 1):
        if descriptor > first:
            last = ctypes.c_uint(descriptor - 1)
            check_syscall(LIBC.syscall(CLOSE_RANGE, ctypes.c_uint(first), last, 0), "close_range")
        first = descriptor + 1


# Landlock (Documentation/userspace-api/landlock.rst)

LANDLOCK_CREATE, LANDLOCK_ADD, LANDLOCK_RESTRICT = 444, 445, 446  # the same on x86_64 and aarch64
EXECUTE, WRITE_FILE, READ_FILE, READ_DIR, TRUNCATE, IOCTL_DEVICE = 1, 2, 4, 8, 1 << 14, 1 << 15
RIGHTS_OF_ABI = (0, 13, 14, 15, 15, 16)  # the number of file rights of each version; later versions as the last
TRUNCATE_ABI, NETWORK_ABI, SCOPE_ABI = 3, 4, 6
FILE_RIGHTS = EXECUTE | WRITE_FILE | READ_FILE | TRUNCATE | IOCTL_DEVICE
LANDLOCK_RIGHTS = {
    "list": READ_FILE | READ_DIR,
    "read": READ_FILE | READ_DIR | EXECUTE,
    "device": READ_FILE | WRITE_FILE,
    "write": (1 << RIGHTS_OF_ABI[-1]) - 1,
}


def landlock_abi() -> int:
    """Return the version of Landlock, or 0 if the kernel has none."""
    return max(0, int(LIBC.syscall(LANDLOCK_CREATE, None, 0, 1)))


def restrict_files(rules: "list[list[str]]", abi: int) -> None:
    """Restrict file access to the given paths and what is below them.

    If the kernel's version supports it, also forbid TCP, and signals and abstract sockets to processes outside.
    """
    if abi < 1:
        raise ConfinementError("this kernel has no Landlock")
    known = (1 << RIGHTS_OF_ABI[min(abi, len(RIGHTS_OF_ABI) - 1)]) - 1
    attributes = struct.pack("=Q", known)
    attributes += struct.pack("=Q", 0b11) if abi >= NETWORK_ABI else b""
    attributes += struct.pack("=Q", 0b11) if abi >= SCOPE_ABI else b""
    ruleset = check_syscall(LIBC.syscall(LANDLOCK_CREATE, attributes, len(attributes), 0), "landlock_create_ruleset")
    for path, kind in rules:
        add_landlock_rule(ruleset, path, LANDLOCK_RIGHTS[kind] & known)
    check_syscall(LIBC.syscall(LANDLOCK_RESTRICT, ruleset, 0), "landlock_restrict_self")
    os.close(ruleset)


def add_landlock_rule(ruleset: int, path: str, rights: int) -> None:
    try:
        beneath = os.open(path, os.O_PATH | os.O_CLOEXEC)
    except (FileNotFoundError, PermissionError):
        return  # a missing or unreachable path needs no rule
    try:
        if not os.path.isdir(path):
            rights &= FILE_RIGHTS
        rule = struct.pack("=Qi", rights, beneath)
        check_syscall(LIBC.syscall(LANDLOCK_ADD, ruleset, 1, rule, 0), f"landlock_add_rule {path}")
    finally:
        os.close(beneath)


# seccomp (seccomp(2), linux/bpf_common.h)

CLONE_NEWTIME, CLONE_NEWNS, CLONE_NEWCGROUP, CLONE_NEWUTS = 0x80, 0x20000, 0x02000000, 0x04000000
CLONE_NEWIPC, CLONE_NEWUSER, CLONE_NEWPID, CLONE_NEWNET = 0x08000000, 0x10000000, 0x20000000, 0x40000000
ALL_NAMESPACES = (
    CLONE_NEWTIME | CLONE_NEWNS | CLONE_NEWCGROUP | CLONE_NEWUTS | CLONE_NEWIPC | CLONE_NEWUSER | CLONE_NEWPID
) | CLONE_NEWNET

# The numbers on (x86_64, aarch64); None if the architecture lacks the call.
FORBIDDEN_SYSCALLS = {
    # network; for socketpair see ``build_filter``
    "socket": (41, 198), "connect": (42, 203), "bind": (49, 200), "listen": (50, 201), "accept": (43, 202),
    "accept4": (288, 242),
    # calls that hold more kernel memory than is counted for a pipe or a socket, or hide descriptors
    "setsockopt": (54, 208), "sendmsg": (46, 211), "sendmmsg": (307, 269), "vmsplice": (278, 75), "splice": (275, 76),
    "tee": (276, 77), "sendfile": (40, 71), "landlock_create_ruleset": (444, 444),
    # other processes
    "ptrace": (101, 117), "process_vm_readv": (310, 270), "process_vm_writev": (311, 271), "kcmp": (312, 272),
    "pidfd_open": (434, 434), "pidfd_getfd": (438, 438), "pidfd_send_signal": (424, 424),
    "process_madvise": (440, 440), "process_mrelease": (448, 448), "migrate_pages": (256, 238),
    "move_pages": (279, 239),
    # namespaces and mounts
    "unshare": (272, 97), "setns": (308, 268), "mount": (165, 40), "umount2": (166, 39), "pivot_root": (155, 41),
    "chroot": (161, 51), "open_tree": (428, 428), "move_mount": (429, 429), "fsopen": (430, 430),
    "fsconfig": (431, 431), "fsmount": (432, 432), "fspick": (433, 433), "mount_setattr": (442, 442),
    "statmount": (457, 457), "listmount": (458, 458), "name_to_handle_at": (303, 264),
    "open_by_handle_at": (304, 265), "quotactl": (179, 60), "quotactl_fd": (443, 443),
    # large kernel subsystems that no such program needs
    "bpf": (321, 280), "perf_event_open": (298, 241), "userfaultfd": (323, 282), "io_uring_setup": (425, 425),
    "io_uring_enter": (426, 426), "io_uring_register": (427, 427), "io_setup": (206, 0), "add_key": (248, 217),
    "request_key": (249, 218), "keyctl": (250, 219), "personality": (135, 92), "modify_ldt": (154, None),
    "set_mempolicy": (238, 237), "lookup_dcookie": (212, 18), "uselib": (134, None), "vhangup": (153, 58),
    # events of files and directories, also of unreadable ones
    "inotify_init": (253, None), "inotify_init1": (294, 26), "inotify_add_watch": (254, 27),
    "fanotify_init": (300, 262),
    # memory that no limit counts, and objects that outlive a process
    "memfd_create": (319, 279), "memfd_secret": (447, 447), "shmget": (29, 194), "shmat": (30, 196),
    "shmctl": (31, 195), "semget": (64, 190), "semop": (65, 193), "semctl": (66, 191), "semtimedop": (220, 192),
    "msgget": (68, 186), "msgsnd": (69, 189), "msgrcv": (70, 188), "msgctl": (71, 187), "mq_open": (240, 180),
    "mq_unlink": (241, 181), "setxattr": (188, 5), "lsetxattr": (189, 6), "fsetxattr": (190, 7),
    "removexattr": (197, 14), "lremovexattr": (198, 15), "fremovexattr": (199, 16),
    # the machine
    "init_module": (175, 105), "finit_module": (313, 273), "delete_module": (176, 106), "kexec_load": (246, 104),
    "kexec_file_load": (320, 294), "reboot": (169, 142), "swapon": (167, 224), "swapoff": (168, 225),
    "sethostname": (170, 161), "setdomainname": (171, 162), "iopl": (172, None), "ioperm": (173, None),
    "acct": (163, 89), "settimeofday": (164, 170), "clock_settime": (227, 112), "clock_adjtime": (305, 266),
    "adjtimex": (159, 171), "syslog": (103, 116),
}  # fmt: skip
# Landlock does not cover these calls. They report success and do nothing: a program that copies a file must not fail
# because it copies the mode too.
NO_OP_SYSCALLS = {
    "chmod": (90, None), "fchmod": (91, 52), "fchmodat": (268, 53), "fchmodat2": (452, 452), "chown": (92, None),
    "lchown": (94, None), "fchown": (93, 55), "fchownat": (260, 54), "utime": (132, None), "utimes": (235, None),
    "futimesat": (261, None), "utimensat": (280, 88),
}  # fmt: skip
# The first argument is the target process: only the process itself if its uid is shared with others.
OWN_PROCESS_SYSCALLS = {
    "prlimit64": (302, 261), "sched_setaffinity": (203, 122), "sched_setscheduler": (144, 119),
    "sched_setparam": (142, 118), "sched_setattr": (314, 274),
}  # fmt: skip
SIGNAL_SYSCALLS = {
    "kill": (62, 129), "tkill": (200, 130), "tgkill": (234, 131), "rt_sigqueueinfo": (129, 138),
    "rt_tgsigqueueinfo": (297, 240),
}  # fmt: skip
SETPRIORITY, IOPRIO_SET, TRUNCATE_PATH = (141, 140), (251, 30), (76, 45)
CLONE, CLONE3, SOCKETPAIR, IOCTL, FCNTL, PRCTL = (56, 220), (435, 435), (53, 199), (16, 29), (72, 25), (157, 167)
MMAP = (9, 222)
LAST_KNOWN_SYSCALL = 462  # mseal, Linux 6.10; later calls fail as on an older kernel

TIOCSTI, TIOCLINUX, FIOSETOWN, SIOCSPGRP = 0x5412, 0x541C, 0x8901, 0x8902
F_SETOWN, F_SETOWN_EX = 8, 15  # set the receiver of SIGIO, or of any signal that F_SETSIG names
F_SETPIPE_SZ = 1031
CLONE_FILES, CLONE_THREAD = 0x400, 0x10000
MAP_SHARED, MAP_TYPES, MAP_ANONYMOUS = 1, 0xF, 0x20
AF_UNIX, SOCK_STREAM, SOCK_TYPES = 1, 1, 0xF

MACHINES = ("x86_64", "aarch64")
AUDIT_ARCH = (0xC000003E, 0xC00000B7)
X32_BIT = 0x40000000
ALLOW, KILL_PROCESS, ERRNO = 0x7FFF0000, 0x80000000, 0x00050000
RETURN_EPERM, RETURN_ENOSYS, RETURN_SUCCESS = ERRNO | errno.EPERM, ERRNO | errno.ENOSYS, ERRNO
LOAD, AND, EQUAL, GREATER, GREATER_OR_EQUAL, RETURN = 0x20, 0x54, 0x15, 0x25, 0x35, 0x06
NUMBER, ARCHITECTURE, ARGUMENTS = 0, 4, 16
ALL_BITS = 0xFFFFFFFF


def return_verdict(verdict: int) -> "tuple[int, int, int, int]":
    return (RETURN, 0, 0, verdict)


def match_syscall(number: "int | None", body: list) -> list:
    """Return the steps that run ``body``, which ends with a verdict, for one system call."""
    return [] if number is None else [(EQUAL, 0, len(body), number), *body]


def require_argument(argument: int, *values: int, mask: int = ALL_BITS) -> list:
    """Reject the call unless a masked argument has one of the values.

    Only the lower half is compared: the kernel treats all these arguments as int.
    """
    tests = [(EQUAL, len(values) - index, 0, value) for index, value in enumerate(values)]
    return [(LOAD, 0, 0, ARGUMENTS + 8 * argument), (AND, 0, 0, mask), *tests, return_verdict(RETURN_EPERM)]


def reject_argument(argument: int, *values: int, mask: int = ALL_BITS) -> list:
    tests = [step for value in values for step in ((EQUAL, 0, 1, value), return_verdict(RETURN_EPERM))]
    return [(LOAD, 0, 0, ARGUMENTS + 8 * argument), (AND, 0, 0, mask), *tests, return_verdict(ALLOW)]


def build_filter(*, allow_truncate: bool, shared_user_rules: list) -> bytes:
    """Return the whole seccomp filter.

    ``allow_truncate``: other restrictions protect files from truncation. ``shared_user_rules``: the rules for a program
    whose user also owns other processes.
    """
    arch = machine_index()
    program = [
        (LOAD, 0, 0, ARCHITECTURE),
        (EQUAL, 1, 0, AUDIT_ARCH[arch]),
        return_verdict(KILL_PROCESS),
        (LOAD, 0, 0, NUMBER),
        (GREATER_OR_EQUAL, 0, 1, X32_BIT),
        return_verdict(KILL_PROCESS),  # the x32 numbers of x86-64 would bypass every rule
        (GREATER, 0, 1, LAST_KNOWN_SYSCALL),
        return_verdict(RETURN_ENOSYS),
    ]
    for numbers in FORBIDDEN_SYSCALLS.values():
        program += match_syscall(numbers[arch], [return_verdict(RETURN_EPERM)])
    # Its flags are in memory, which no filter can read; libraries then fall back to clone.
    program += match_syscall(CLONE3[arch], [return_verdict(RETURN_ENOSYS)])
    # Threads must share their descriptors: the watchdog inspects those of one thread.
    threads = reject_argument(0, CLONE_THREAD, mask=CLONE_THREAD | CLONE_FILES)
    program += match_syscall(CLONE[arch], [*require_argument(0, 0, mask=ALL_NAMESPACES), *threads])
    # A datagram socket of a pair could send to any named socket of the host.
    program += match_syscall(
        SOCKETPAIR[arch],
        [*require_argument(0, AF_UNIX), *require_argument(1, SOCK_STREAM, mask=SOCK_TYPES), return_verdict(ALLOW)],
    )
    program += match_syscall(IOCTL[arch], reject_argument(1, TIOCSTI, TIOCLINUX, FIOSETOWN, SIOCSPGRP))
    program += match_syscall(FCNTL[arch], reject_argument(1, F_SETOWN, F_SETOWN_EX, F_SETPIPE_SZ))
    # Shared anonymous memory belongs to no process: pages that one has written and unmapped stay, and appear nowhere.
    program += match_syscall(MMAP[arch], reject_argument(3, MAP_SHARED | MAP_ANONYMOUS, mask=MAP_TYPES | MAP_ANONYMOUS))
    # Else the watchdog could no longer measure the process.
    program += match_syscall(PRCTL[arch], reject_argument(0, PR_SET_DUMPABLE))
    if not allow_truncate:
        program += match_syscall(TRUNCATE_PATH[arch], [return_verdict(RETURN_EPERM)])
    return b"".join(
        struct.pack("=HBBI", *instruction) for instruction in [*program, *shared_user_rules, return_verdict(ALLOW)]
    )


def shared_user_rules(*, signals_confined: bool) -> list:
    """Return rules that protect other processes and files of the program's user.

    ``signals_confined``: other restrictions already confine signals.
    """
    arch, pid = machine_index(), os.getpid()
    program: list = []
    for numbers in NO_OP_SYSCALLS.values():
        program += match_syscall(numbers[arch], [return_verdict(RETURN_SUCCESS)])
    for numbers in OWN_PROCESS_SYSCALLS.values():
        program += match_syscall(numbers[arch], [*require_argument(0, 0, pid), return_verdict(ALLOW)])
    program += match_syscall(
        SETPRIORITY[arch], [*require_argument(0, 0), *require_argument(1, 0, pid), return_verdict(ALLOW)]
    )
    program += match_syscall(IOPRIO_SET[arch], [return_verdict(RETURN_EPERM)])
    if not signals_confined:
        for numbers in SIGNAL_SYSCALLS.values():
            program += match_syscall(numbers[arch], [*require_argument(0, pid), return_verdict(ALLOW)])
    return program


def machine_index() -> int:
    """Return the index of this machine in a pair (x86_64, aarch64)."""
    name = os.uname().machine
    if name not in MACHINES:
        raise ConfinementError(f"no seccomp filter for {name}")
    return MACHINES.index(name)


def install_filter(code: bytes) -> None:
    buffer = ctypes.create_string_buffer(code, len(code))
    header = struct.pack("@HxxxxxxP", len(code) // 8, ctypes.addressof(buffer))
    check_syscall(LIBC.prctl(PR_SET_SECCOMP, 2, header, 0, 0), "seccomp")


# Namespaces (unshare(2))


def unshare_namespaces(uid: "int | None") -> bool:
    """Create namespaces of processes, network, IPC, host name and cgroups for future children.

    Return whether the kernel allows it. Without root it requires a user namespace, which maps the user to itself.
    """
    spaces = CLONE_NEWPID | CLONE_NEWNET | CLONE_NEWIPC | CLONE_NEWUTS | CLONE_NEWCGROUP
    if uid is not None:
        return bool(LIBC.unshare(spaces) == 0)
    uid_here, gid_here = os.getuid(), os.getgid()
    if LIBC.unshare(spaces | CLONE_NEWUSER) != 0:
        return False
    for name, line in (
        ("setgroups", "deny"),
        ("uid_map", f"{uid_here} {uid_here} 1"),
        ("gid_map", f"{gid_here} {gid_here} 1"),
    ):
        with open(f"/proc/self/{name}", "w") as file:
            file.write(line)
    return True


# The child


def resource_limits(config: dict, processes: int) -> "list[tuple[int, int]]":
    return [
        (resource.RLIMIT_CPU, config["cpuSeconds"]),
        (resource.RLIMIT_AS, config["addressSpaceMb"] * MEGABYTE),
        (resource.RLIMIT_FSIZE, config["fileMb"] * MEGABYTE),
        (resource.RLIMIT_NOFILE, config["openFiles"]),
        (resource.RLIMIT_STACK, 8 * MEGABYTE),
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_MEMLOCK, 0),
        (resource.RLIMIT_MSGQUEUE, 0),
        (resource.RLIMIT_NPROC, processes),
    ]


def set_resource_limits(values: "list[tuple[int, int]]") -> None:
    for number, value in values:
        hard = resource.getrlimit(number)[1]
        value = value if hard == resource.RLIM_INFINITY else min(value, hard)
        resource.setrlimit(number, (value, value))


def drop_privileges(uid: int) -> None:
    """Switch to a user and group that own nothing, irreversibly: all three ids change."""
    os.setgroups([])
    os.setresgid(uid, uid, uid)
    os.setresuid(uid, uid, uid)
    LIBC.prctl(PR_SET_DUMPABLE, 1, 0, 0, 0)  # the switch clears it, and the watchdog must read /proc


def set_parent_death_signal() -> None:
    LIBC.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)


def exec_program(config: dict, own_pids: bool) -> None:
    """Set up the remaining restrictions, then exec the program."""
    uid, processes = config["uid"], config["processes"]
    os.umask(0o077)
    os.chdir(config["directory"])
    if uid is not None:
        drop_privileges(uid)
    elif not own_pids:
        processes += count_threads_of_user(os.getuid())  # the limit includes those that already run
    set_parent_death_signal()  # again: the change of user clears it
    set_resource_limits(resource_limits(config, processes))
    check_syscall(LIBC.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0), "no_new_privs")
    abi = landlock_abi()
    others = [] if uid is not None else shared_user_rules(signals_confined=own_pids or abi >= SCOPE_ABI)
    code = build_filter(allow_truncate=uid is not None or abi >= TRUNCATE_ABI, shared_user_rules=others)
    restrict_files(config["rules"], abi)
    install_filter(code)
    for number in (signal.SIGINT, signal.SIGPIPE, signal.SIGXFSZ):
        signal.signal(number, signal.SIG_DFL)
    os.execve(config["command"][0], config["command"], config["environment"])


def run_init(config: dict, report: int) -> None:
    """Run as process 1 of new namespaces: start the program, reap, report its exit, and exit with all processes."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    set_parent_death_signal()
    program = os.fork()
    if program == 0:
        os.setsid()
        exec_program(config, own_pids=True)
    for descriptor in (0, 1, 2):  # else a reader of the output would wait for this process
        os.close(descriptor)
    while True:
        pid, status, usage = os.wait4(-1, 0)
        if pid == program:
            os.write(report, STATUS_EXITED + EXIT_STATUS.pack(status, usage.ru_maxrss))
            return


def exec_bubblewrap(config: dict, report: int) -> None:
    """Exec bubblewrap, which runs ``sandbox_child.py``: that sets the limits, which bubblewrap itself would exceed."""
    if config["cgroup"]:
        write_file(f"{config['cgroup']}/cgroup.procs", "0")
    if config["uid"] is not None:
        drop_privileges(config["uid"])
    set_parent_death_signal()
    filter_read, filter_write = os.pipe()
    os.write(filter_write, build_filter(allow_truncate=True, shared_user_rules=[]))
    os.close(filter_write)
    for descriptor in (filter_read, report):
        os.set_inheritable(descriptor, True)
    limits_text = ",".join(f"{number}:{value}" for number, value in resource_limits(config, config["processes"]))
    environment = "\n".join(f"{name}={value}" for name, value in config["environment"].items())
    child = [*config["child"], str(report), limits_text, environment, *config["command"]]
    bubblewrap = [*config["bubblewrap"], "--seccomp", str(filter_read), "--", *child]
    os.execve(bubblewrap[0], bubblewrap, {})  # an empty environment: the program can read that of process 1


def run_child(config: dict, report: int) -> None:
    """Become the program, or its parent if the program gets its own pid namespace."""
    os.setsid()  # a signal to the program's process group must not reach the shim
    if config["bubblewrap"]:
        exec_bubblewrap(config, report)
    set_parent_death_signal()
    if config["namespaces"] and unshare_namespaces(config["uid"]):
        init = os.fork()
        if init == 0:
            os.write(report, STATUS_HAS_INIT)
            run_init(config, report)
            return
        for descriptor in (0, 1, 2, report):
            os.close(descriptor)
        os.waitpid(init, 0)
    elif config["namespaces"] and config["uid"] is None:
        raise ConfinementError("no namespaces for this user")
    else:
        os.write(report, STATUS_NO_INIT)
        exec_program(config, own_pids=False)


def start_program(config: dict, stdout: int, stderr: int) -> "tuple[int, int]":
    """Fork the program; return the pid of the program or of its parent, and its status pipe."""
    status, report = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            os.setpriority(os.PRIO_PROCESS, 0, max(NICE, os.getpriority(os.PRIO_PROCESS, 0)))
            for number, descriptor in enumerate((os.open(config["stdin"], os.O_RDONLY), stdout, stderr)):
                os.dup2(descriptor, number)
            close_descriptors_except(report)
            run_child(config, report)
        except BaseException as error:  # noqa: BLE001 - it is reported, and nothing has run
            os.write(report, STATUS_FAILED + f" {type(error).__name__}: {error}".encode()[:1000])
        finally:
            os._exit(125)
    for descriptor in (report, stdout, stderr):
        os.close(descriptor)
    return child, status


# The shim


def count_threads_of_user(uid: int) -> int:
    count = 0
    for pid in filter(str.isdigit, os.listdir("/proc")):
        try:
            if os.stat(f"/proc/{pid}").st_uid == uid:
                count += len(os.listdir(f"/proc/{pid}/task"))
        except OSError:
            continue
    return count


def thread_paths(pid: int) -> "list[str]":
    """Return the /proc paths of the threads of a process.

    /proc shows neither memory nor files of a thread that has ended, even of the first; and each has its own children.
    """
    try:
        return [f"/proc/{pid}/task/{task}" for task in os.listdir(f"/proc/{pid}/task")]
    except OSError:
        return []


def children_of(pid: int) -> "list[int]":
    pids: list[int] = []
    for task in thread_paths(pid):
        try:
            with open(f"{task}/children") as file:
                pids += map(int, file.read().split())
        except OSError:
            continue
    return pids


def descendants_of(roots: "list[int]") -> "list[int]":
    """Return these processes and all their descendants; daemons too, since the shim is their subreaper."""
    pids = []
    while roots:
        pid = roots.pop()
        pids.append(pid)
        roots += children_of(pid)
    return pids


def resident_by_thread(pids: "list[int]") -> "dict[str, int]":
    """Return the resident bytes of each running process, by the path of one of its threads."""
    sizes = {}
    for pid in pids:
        for task in thread_paths(pid):
            size = resident_bytes(task)
            if size:
                sizes[task] = size
                break
    return sizes


def resident_bytes(task: str) -> int:
    try:
        with open(f"{task}/statm") as file:
            return int(file.read().split()[1]) * resource.getpagesize()
    except (OSError, IndexError):
        return 0


def proportional_bytes(tasks: "dict[str, int]") -> int:
    """Return the resident bytes, with shared pages divided among the processes: exact, but slower."""
    total = 0
    for task, size in tasks.items():
        try:
            with open(f"{task}/smaps_rollup") as file:
                total += next(int(line.split()[1]) << 10 for line in file if line.startswith("Pss:"))
        except (OSError, StopIteration):
            total += size
    return total


class HeldResources:
    """Resources that processes hold and that no directory shows.

    These are bytes of deleted files, and bytes in pipes and sockets, each counted as full. ``unreadable`` are the
    processes that cannot be inspected.
    """

    def __init__(self, config: dict, pids: "Iterable[int]") -> None:
        self.config = config
        self.disk = self.memory = self.mappings = 0
        self.socket_bytes = max_socket_bytes()
        self.open_files: set[tuple[int, int]] = set()
        self.mapped_files: set[tuple[int, int]] = set()
        self.unreadable = [pid for pid in pids if not self.inspect(pid)]
        if self.unreadable and config["uid"] is not None:
            self.inspect_as(config["uid"])
        # Only the kernel knows the size of files that are mapped and no longer open: count their maximum.
        self.disk += config["fileMb"] * MEGABYTE * len(self.mapped_files - self.open_files)

    def inspect(self, pid: int) -> bool:
        """Inspect a process by a thread that still runs afterwards: a thread that has ended shows nothing."""
        tasks = thread_paths(pid)
        for task in tasks:
            try:
                self.count_descriptors(f"{task}/fd")
                self.count_mappings(f"{task}/maps")
            except OSError:
                continue
            if resident_bytes(task):
                return True
        return len(tasks) < 2 and not resident_by_thread([pid])  # the whole process has ended

    def inspect_as(self, uid: int) -> None:
        """Inspect the unreadable processes as their own user, who may read what root in a container may not."""
        try:
            LIBC.setfsgid(uid)
            LIBC.setfsuid(uid)
            self.unreadable = [pid for pid in self.unreadable if not self.inspect(pid)]
        finally:
            LIBC.setfsuid(os.geteuid())
            LIBC.setfsgid(os.getegid())

    def count_descriptors(self, directory: str) -> None:
        for number in os.listdir(directory):
            try:
                status = os.stat(f"{directory}/{number}")
            except FileNotFoundError:
                continue
            if (status.st_dev, status.st_ino) not in self.open_files:
                self.open_files.add((status.st_dev, status.st_ino))
                self.count_descriptor(status)

    def count_descriptor(self, status: os.stat_result) -> None:
        if stat.S_ISSOCK(status.st_mode):
            self.memory += self.socket_bytes
        elif stat.S_ISFIFO(status.st_mode):
            self.memory += MAX_PIPE_BYTES
        elif not status.st_nlink:
            self.disk += status.st_blocks * 512

    def count_mappings(self, path: str) -> None:
        with open(path, "rb") as file:
            for line in file:
                self.mappings += 1
                if self.mappings > MAX_MAPPINGS:
                    raise OSError(f"too many mappings: {path}")
                if line.endswith(b" (deleted)\n"):
                    self.count_mapping(line.split(None, 5))

    def count_mapping(self, fields: "list[bytes]") -> None:
        _, _, _, device, inode, path = fields
        if path.startswith(SHARED_MEMORY_PATH):
            self.memory += self.config["addressSpaceMb"] * MEGABYTE
            return
        major, minor = device.split(b":")
        self.mapped_files.add((os.makedev(int(major, 16), int(minor, 16)), int(inode)))


def max_socket_bytes() -> int:
    try:
        with open(WRITE_BUFFER_SETTING) as file:
            return max(MAX_SOCKET_BYTES, int(file.read()))
    except OSError:  # missing in a network namespace
        return MAX_SOCKET_BYTES


def exceeds_disk_limit(directory: str, max_bytes: int) -> bool:
    """Return whether a directory exceeds its limit; one that is too deep or unreadable counts as exceeding."""
    size, files, directories = 0, 0, [directory]
    while directories:
        try:
            with os.scandir(directories.pop()) as entries:
                for entry in entries:
                    files += 1
                    size += entry.stat(follow_symlinks=False).st_blocks * 512
                    if entry.is_dir(follow_symlinks=False):
                        directories.append(entry.path)
                    if files > MAX_SCANNED_FILES or size > max_bytes:
                        return True
        except FileNotFoundError:
            continue
        except OSError:
            return True
    return False


def kill_all() -> None:
    """Kill and reap until no process is left; first forbid forks, so that a fork bomb cannot outrun it."""
    while True:
        pids = descendants_of(children_of(os.getpid()))
        for pid in pids:
            try:
                resource.prlimit(pid, resource.RLIMIT_NPROC, (0, 0))
            except (OSError, ValueError):
                continue
        kill_processes(pids)
        try:
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        except ChildProcessError:
            return
        time.sleep(0.001)


def kill_processes(pids: "list[int]") -> None:
    for pid in pids:
        try:
            os.kill(pid, signal.SIGKILL)
        except OSError:
            continue


def make_cgroup(config: dict) -> None:
    os.mkdir(config["cgroup"])
    for name, value in config["cgroupLimits"].items():
        try:
            write_file(f"{config['cgroup']}/{name}", value)
        except OSError:
            if name not in config["cgroupOptionalLimits"]:
                raise


def write_file(path: str, value: str) -> None:
    descriptor = os.open(path, os.O_WRONLY)
    try:
        os.write(descriptor, value.encode())
    finally:
        os.close(descriptor)


def was_oom_killed(cgroup: str) -> bool:
    try:
        with open(f"{cgroup}/memory.events") as file:
            return any(line.startswith("oom_kill ") and int(line.split()[1]) > 0 for line in file)
    except OSError:
        return False


def remove_cgroup(cgroup: str) -> None:
    """Remove the group of reaped processes; retry, since the kernel may take a moment to see that it is empty."""
    for _ in range(MAX_CGROUP_REMOVAL_ATTEMPTS):
        try:
            os.rmdir(cgroup)
        except FileNotFoundError:
            return
        except OSError:
            time.sleep(0.005)
        else:
            return


class Watchdog:
    """The watchdog of a program: waits for its end, and stops it if it exceeds a limit."""

    def __init__(self, config: dict, child: int, status: int, channel: int) -> None:
        self.config, self.child, self.status, self.channel = config, child, status, channel
        self.started_at = time.monotonic()
        self.next_disk_check_at = 0.0
        self.peak_bytes = self.kernel_bytes = 0
        self.had_unreadable = False
        self.stop_reason: str | None = None

    def wait(self) -> "tuple[int, int]":
        """Wait for the end of the program; return its wait status and its peak memory in kilobytes."""
        poll = select.poll()
        exited = os.pidfd_open(self.child)
        poll.register(exited, select.POLLIN)
        poll.register(self.channel, select.POLLIN)
        while True:
            events = dict(poll.poll(WATCH_INTERVAL_SECONDS * 1000))
            if exited in events:
                return self.read_exit_status()
            self.stop_reason = "cancelled" if events else self.exceeded_limit()
            if self.stop_reason:
                return signal.SIGKILL, 0

    def read_exit_status(self) -> "tuple[int, int]":
        _, status, usage = os.wait4(self.child, 0)
        os.set_blocking(self.status, False)
        try:
            messages = os.read(self.status, 4096)
        except BlockingIOError:
            messages = b""
        if messages == STATUS_NO_INIT:
            return status, usage.ru_maxrss
        if messages == STATUS_HAS_INIT:
            return signal.SIGKILL, 0  # its init was killed
        if messages.startswith(STATUS_HAS_INIT + STATUS_EXITED):
            return EXIT_STATUS.unpack(messages[2 : 2 + EXIT_STATUS.size])
        text = messages[2:].partition(STATUS_EXITED)[0]  # its init may have reported the exit too
        raise ConfinementError(text.decode(errors="replace") or "the confinement did not start")

    def exceeded_limit(self) -> "str | None":
        now = time.monotonic()
        if now - self.started_at > self.config["timeout"]:
            return "time"
        pids = descendants_of(children_of(os.getpid()))
        if self.exceeds_memory(resident_by_thread(pids)):
            return "memory"
        if now >= self.next_disk_check_at:
            if self.exceeds_disk(pids):
                return "disk"
            self.next_disk_check_at = now + DISK_CHECK_BACKOFF * (time.monotonic() - now)
        return None

    def exceeds_memory(self, tasks: "dict[str, int]") -> bool:
        max_bytes: int = self.config["memoryMb"] * MEGABYTE
        memory = sum(tasks.values())
        if memory + self.kernel_bytes > max_bytes:  # only here, pages that forks share are counted once
            memory = min(memory, proportional_bytes(tasks))
        self.peak_bytes = max(self.peak_bytes, memory)
        return memory + self.kernel_bytes > max_bytes

    def exceeds_disk(self, pids: "list[int]") -> bool:
        held = HeldResources(self.config, pids)
        self.kernel_bytes = held.memory
        # A single unreadable check may be chance: the process was about to exit or to exec.
        was_unreadable, self.had_unreadable = self.had_unreadable, bool(held.unreadable)
        max_bytes: int = self.config["diskMb"] * MEGABYTE
        return (was_unreadable and self.had_unreadable) or exceeds_disk_limit(
            self.config["work"], max_bytes - held.disk
        )


def supervise(config: dict, stdout: int, stderr: int, channel: int) -> dict:
    started_at = time.monotonic()
    try:
        if config["cgroup"]:
            make_cgroup(config)
        child, status = start_program(config, stdout, stderr)
        watchdog = Watchdog(config, child, status, channel)
        wait_status, kilobytes = watchdog.wait()
        if config["cgroup"] and watchdog.stop_reason is None and was_oom_killed(config["cgroup"]):
            watchdog.stop_reason = "memory"
    finally:
        kill_all()
        if config["cgroup"]:
            remove_cgroup(config["cgroup"])
    return {
        "exitCode": os.WEXITSTATUS(wait_status) if os.WIFEXITED(wait_status) else None,
        "signal": os.WTERMSIG(wait_status) if os.WIFSIGNALED(wait_status) else None,
        "stopReason": watchdog.stop_reason,
        "durationMs": round((time.monotonic() - started_at) * 1000),
        "maxRssKb": max(kilobytes, watchdog.peak_bytes >> 10),
    }


def remove_directory(root: str) -> None:
    """Remove a job's directory.

    ``rm`` removes trees of any depth; ``chmod`` restores permissions that the program may have removed.
    """
    if remove_flat_directory(root):
        return
    for command in (["/bin/rm", "-rf", root], ["/bin/chmod", "-R", "u+rwx", root], ["/bin/rm", "-rf", root]):
        if not os.path.lexists(root):
            return
        null = [(os.POSIX_SPAWN_OPEN, 2, "/dev/null", os.O_WRONLY, 0)]
        os.waitpid(os.posix_spawn(command[0], command, {}, file_actions=null), 0)


def remove_flat_directory(root: str) -> bool:
    """Remove a directory with at most one level below it; return whether that was enough.

    Most jobs leave such a directory, which needs no other program.
    """
    try:
        for name in os.listdir(root):
            path = f"{root}/{name}"
            if not os.path.isdir(path):
                os.unlink(path)
                continue
            for entry in os.listdir(path):
                os.unlink(f"{path}/{entry}")
            os.rmdir(path)
        os.rmdir(root)
    except OSError:
        return False
    return True


def run_shim(path: str, stdout: int, stderr: int, channel: int) -> None:
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    os.setsid()
    LIBC.prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    try:
        os.write(channel, STATUS_LAUNCHED)
        with open(path) as file:
            config = json.load(file)
        outcome = supervise(config, stdout, stderr, channel)
    except (ConfinementError, OSError) as error:
        outcome = {"error": str(error)}
    finally:
        remove_directory(os.path.dirname(path))
    try:
        os.write(channel, json.dumps(outcome).encode())
    except OSError:
        return  # the worker no longer waits for it


# The process that forks the shims


class Launcher:
    """The process that forks the shims."""

    def __init__(self, control: socket.socket, directory: str) -> None:
        self.control, self.directory = control, directory
        self.shims: set[int] = set()

    def serve(self) -> None:
        """Serve until the worker closes the control socket or exits, and then until the last shim exits."""
        remove_stale_directories(self.directory)
        LIBC.prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)  # reap() kills the programs that a killed shim leaves
        signal.signal(signal.SIGCHLD, lambda *_: self.reap())
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            signal.signal(number, signal.SIG_IGN)  # the launcher exits when the worker closes the control socket
        gc.freeze()
        while True:
            message, descriptors, _, _ = socket.recv_fds(
                self.control, MAX_CONTROL_MESSAGE_BYTES, 3, socket.MSG_CMSG_CLOEXEC
            )
            if not message:
                break
            self.launch(message.decode(), descriptors)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        while self.shims:
            self.reap()
            time.sleep(0.01)
        remove_directory(self.directory)

    def launch(self, path: str, descriptors: "list[int]") -> None:
        # Else reap() would kill the shim before it is in the set.
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGCHLD])
        shim = os.fork()
        if shim == 0:
            try:
                self.control.close()
                signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGCHLD])
                run_shim(path, *descriptors)
            finally:
                os._exit(0)
        self.shims.add(shim)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGCHLD])
        for descriptor in descriptors:
            os.close(descriptor)

    def reap(self) -> None:
        try:
            while (pid := os.waitpid(-1, os.WNOHANG)[0]) != 0:
                self.shims.discard(pid)
        except ChildProcessError:
            self.shims.clear()
        for orphan in set(children_of(os.getpid())) - self.shims:
            kill_processes(descendants_of([orphan]))


def remove_stale_directories(directory: str) -> None:
    """Remove unlocked directories like ``directory``: those of workers that were killed with their launchers."""
    parent, name = os.path.split(directory)
    for entry in os.scandir(parent):
        if not entry.name.startswith(name.partition("-")[0] + "-") or not entry.is_dir(follow_symlinks=False):
            continue
        try:
            status = entry.stat(follow_symlinks=False)
            if status.st_uid != os.geteuid() or time.time() - status.st_ctime < MIN_STALE_SECONDS:
                continue
            descriptor = os.open(entry.path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                remove_directory(entry.path)
            finally:
                os.close(descriptor)
        except OSError:
            continue


def main() -> None:
    control, lock, directory = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
    close_descriptors_except(control, lock)
    for descriptor in (control, lock):  # for the launcher and its shims, not for programs
        os.set_inheritable(descriptor, False)
    Launcher(socket.socket(fileno=control), directory).serve()


if __name__ == "__main__":
    main()
