"""Where heavy and dangerous work on documents is done: a process of its own, which forks for each piece of it.

Such a piece may crash, hang or take up memory: that ends the fork, and nobody else hears of it. Imports little, to
be there soon.
"""

import os
import pickle
import resource
import signal
import socket
import struct
from collections.abc import Callable
from typing import Any

from server.documents import updates

HEADER = struct.Struct("!iQ")  # how it ended, as waitstatus_to_exitcode says it, and the length of what follows
MADE, REFUSED, TOO_MUCH = 0, 1, 2  # exit codes
SECONDS = 30  # for one piece of work
PROCESSOR_SECONDS = 20  # of these, however slow the machine is: whoever needs more has been caught in a loop
STACK_BYTES = 2 << 20  # less than a server has: what does not exhaust ours will not exhaust its
CHUNK_BYTES = 1 << 20


def main() -> None:
    """Work on what comes through the socket that is our standard input, until that is closed."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)  # whoever gives us work decides when to stop
    resource.setrlimit(resource.RLIMIT_STACK, (STACK_BYTES, resource.getrlimit(resource.RLIMIT_STACK)[1]))
    door = socket.socket(fileno=0)
    while (header := _receive(door, HEADER.size)) is not None:
        _, length = HEADER.unpack(header)
        request = _receive(door, length)
        if request is None:
            return
        status, answer = _apart(request)
        door.sendall(HEADER.pack(status, len(answer)))
        door.sendall(answer)


def _receive(door: socket.socket, size: int) -> bytes | None:
    received = bytearray()
    while len(received) < size:
        chunk = door.recv(min(CHUNK_BYTES, size - len(received)))
        if not chunk:
            return None
        received += chunk
    return bytes(received)


def _apart(request: bytes) -> tuple[int, bytes]:
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        signal.alarm(SECONDS)  # also when whoever waits is gone
        resource.setrlimit(resource.RLIMIT_CPU, (PROCESSOR_SECONDS, PROCESSOR_SECONDS + 1))
        os.close(read)
        os._exit(_work(request, write))
    os.close(write)
    with os.fdopen(read, "rb") as pipe:
        answer = pipe.read()
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), answer


def _work(request: bytes, write: int) -> int:
    try:
        name, arguments = pickle.loads(request)  # noqa: S301 - written by our own parent
        work: Callable[..., Any] = getattr(updates, name)
        answer = pickle.dumps(work(*arguments), protocol=pickle.HIGHEST_PROTOCOL)
    except MemoryError:
        return TOO_MUCH
    except BaseException:  # noqa: BLE001 - pycrdt's PanicException is one
        return REFUSED
    with os.fdopen(write, "wb") as pipe:
        pipe.write(answer)
    return MADE


if __name__ == "__main__":
    main()
