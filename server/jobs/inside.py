"""Process 1 within bubblewrap: sets the last limits, starts the program, reaps, and tells how the program ended.

``python -I -S inside.py REPORT JSON``: the descriptor to tell it on, and limits, command and environment. Of the
standard library only, and short: it is compiled for every program. By now all other walls stand.
"""

import json
import os
import resource
import signal
import struct
import sys


def main() -> None:
    report = int(sys.argv[1])
    limits, command, environment = json.loads(sys.argv[2])
    os.write(report, b"+")
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the program could send it; all others pass by process 1
    for what, value in limits:  # ours too, or a program that takes us over would have none
        hard = resource.getrlimit(what)[1]
        value = value if hard == resource.RLIM_INFINITY else min(value, hard)
        resource.setrlimit(what, (value, value))
    program = os.fork()
    if program == 0:
        try:
            os.setsid()
            os.set_inheritable(report, False)
            for number in (signal.SIGINT, signal.SIGPIPE, signal.SIGXFSZ):
                signal.signal(number, signal.SIG_DFL)
            os.execve(command[0], command, environment)
        except BaseException as error:  # noqa: BLE001 - it is told, and nothing has run
            os.write(report, f"! {type(error).__name__}: {error}".encode()[:1000])
        finally:
            os._exit(125)
    for descriptor in (0, 1, 2):  # or a reader of the output would wait for us
        os.close(descriptor)
    while True:
        pid, status, usage = os.wait4(-1, 0)
        if pid == program:
            os.write(report, b"=" + struct.pack("=iq", status, usage.ru_maxrss))
            return


if __name__ == "__main__":
    main()
