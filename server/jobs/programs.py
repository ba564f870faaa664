"""What is run: a program in one of the languages that this machine has, within limits."""

import os
import shutil
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path


@dataclass(frozen=True)
class Limits:
    timeout_seconds: int = 10
    memory_mb: int = 128
    processes: int = 32
    file_mb: int = 16
    disk_mb: int = 64
    open_files: int = 64  # each may be a pipe or a socket, full


@dataclass(frozen=True)
class Language:
    """How a language's programs are started; ``file`` is what the code is called."""

    name: str
    file: str
    command: tuple[str, ...]
    # A runtime that reserves address space cannot be held by it; the watcher of resident memory does that.
    address_space_mb: Callable[[int], int] = lambda memory: memory + 64
    options: Callable[[int], tuple[str, ...]] = lambda _: ()
    exhausted: str = "MemoryError"  # what it says when an allocation fails


@dataclass(frozen=True)
class Program:
    """What is to run."""

    language: Language
    code: str
    stdin: str = ""
    args: Sequence[str] = ()
    files: Mapping[str, bytes] = field(default_factory=dict)
    limits: Limits = Limits()


def installed() -> tuple[Language, ...]:
    """The languages that this machine has; one that cannot be confined is dropped by the self-test."""
    pythons = ("/usr/bin/python3", "/usr/local/bin/python3", os.path.realpath(sys.executable))
    found = [
        Language("python", "main.py", (python, "-E", "-s", "-B", "-u"))
        for python in pythons
        if os.access(python, os.X_OK)
    ]
    if node := shutil.which("node", path="/usr/local/bin:/usr/bin"):
        found.append(
            Language(
                "javascript",
                "main.js",
                (node,),
                address_space_mb=lambda _: 4096,
                options=lambda memory: (f"--max-old-space-size={memory}",),
                exhausted="heap out of memory",
            )
        )
    if Path("/bin/bash").exists():
        found.append(Language("bash", "main.sh", ("/bin/bash",), exhausted="cannot allocate"))
    return tuple(found)
