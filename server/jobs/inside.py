"""Process 1 within bubblewrap: sets the last limits, starts the program, reaps, and tells how the program ended.

``python -I -S inside.py REPORT LIMITS ENVIRONMENT COMMAND...``: the descriptor to tell it on, limits as
``what:value,...``, the program's environment as lines of ``name=value``. By now all other walls stand. It is compiled
for every program, so it is short, and imports what takes no time.
"""

import os
import resource
import sys

AS_AT_BIRTH = (2, 13, 25)  # SIGINT, SIGPIPE, SIGXFSZ: Python has taken them for itself


def main() -> None:
    report, limits, command = int(sys.argv[1]), sys.argv[2], sys.argv[4:]
    environment = dict(line.split("=", 1) for line in sys.argv[3].split("\n"))
    os.write(report, b"+")
    os.set_inheritable(report, False)
    for each in limits.split(","):  # ours too, or a program that takes us over would have none
        what, value = map(int, each.split(":"))
        hard = resource.getrlimit(what)[1]
        value = value if hard == resource.RLIM_INFINITY else min(value, hard)
        resource.setrlimit(what, (value, value))
    try:
        program = os.posix_spawn(command[0], command, environment, setsigdef=AS_AT_BIRTH, setsid=True)
    except OSError as error:
        os.write(report, f"! {error}".encode()[:1000])
        return
    for descriptor in (0, 1, 2):  # or a reader of the output would wait for us
        os.close(descriptor)
    while True:
        try:
            pid, status, usage = os.wait4(-1, 0)
        except KeyboardInterrupt:
            continue  # from the program: no other signal passes by process 1
        if pid == program:
            os.write(report, b"=" + status.to_bytes(4, "little") + usage.ru_maxrss.to_bytes(8, "little"))
            return


if __name__ == "__main__":
    main()
