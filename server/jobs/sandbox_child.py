"""Process 1 in bubblewrap: sets the last limits, starts the program, reaps, and reports how the program ended.

Usage: ``python -I -S sandbox_child.py REPORT LIMITS ENVIRONMENT COMMAND...``. REPORT is the descriptor for the report,
LIMITS are ``resource:value,...``, ENVIRONMENT is lines of ``name=value``. All other restrictions are already in force.
Python compiles this file for every program, so it is short and imports only fast modules.
"""

import os
import resource
import sys

DEFAULT_SIGNALS = (2, 13, 25)  # SIGINT, SIGPIPE, SIGXFSZ: Python changes their disposition


def main() -> None:
    report, limits, command = int(sys.argv[1]), sys.argv[2], sys.argv[4:]
    environment = dict(line.split("=", 1) for line in sys.argv[3].split("\n"))
    os.write(report, b"+")
    os.set_inheritable(report, False)
    for limit in limits.split(","):  # for this process too, or a program that takes it over would have none
        number, value = map(int, limit.split(":"))
        hard = resource.getrlimit(number)[1]
        value = value if hard == resource.RLIM_INFINITY else min(value, hard)
        resource.setrlimit(number, (value, value))
    try:
        program = os.posix_spawn(command[0], command, environment, setsigdef=DEFAULT_SIGNALS, setsid=True)
    except OSError as error:
        os.write(report, f"! {error}".encode()[:1000])
        return
    for descriptor in (0, 1, 2):  # or a reader of the output would wait for this process
        os.close(descriptor)
    while True:
        try:
            pid, status, usage = os.wait4(-1, 0)
        except KeyboardInterrupt:
            continue  # sent by the program: no other signal reaches process 1
        if pid == program:
            os.write(report, b"=" + status.to_bytes(4, "little") + usage.ru_maxrss.to_bytes(8, "little"))
            return


if __name__ == "__main__":
    main()
