"""Programs, their languages and their limits; the languages are those installed on this machine."""

import os
import shutil
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path


@dataclass(frozen=True)
class ProgramLimits:
    timeout_seconds: int = 10
    memory_mb: int = 128
    processes: int = 32
    file_mb: int = 16
    disk_mb: int = 64
    open_files: int = 64  # each may be a full pipe or socket, which holds kernel memory


@dataclass(frozen=True)
class Language:
    """A language and its start command; ``file`` is the name of the file with the code."""

    name: str
    file: str
    command: tuple[str, ...]
    # Address space cannot limit a runtime that reserves a lot of it; the watchdog limits its resident memory.
    address_space_mb: Callable[[int], int] = lambda memory: memory + 64
    options: Callable[[int], tuple[str, ...]] = lambda _: ()
    out_of_memory_text: str = "MemoryError"  # printed when an allocation fails


@dataclass(frozen=True)
class Program:
    """A program to run."""

    language: Language
    code: str
    stdin: str = ""
    args: Sequence[str] = ()
    files: Mapping[str, bytes] = field(default_factory=dict)
    limits: ProgramLimits = ProgramLimits()


def installed_languages() -> tuple[Language, ...]:
    """Return the languages installed on this machine; the self-test drops those that cannot be confined."""
    pythons = ("/usr/bin/python3", "/usr/local/bin/python3", os.path.realpath(sys.executable))
    languages = [
        Language("python", "main.py", (python, "-E", "-s", "-B", "-u"))
        for python in pythons
        if os.access(python, os.X_OK)
    ]
    if node := shutil.which("node", path="/usr/local/bin:/usr/bin"):
        languages.append(
            Language(
                "javascript",
                "main.js",
                (node,),
                address_space_mb=lambda _: 4096,
                options=lambda memory: (f"--max-old-space-size={memory}",),
                out_of_memory_text="heap out of memory",
            )
        )
    if Path("/bin/bash").exists():
        languages.append(Language("bash", "main.sh", ("/bin/bash",), out_of_memory_text="cannot allocate"))
    return tuple(languages)
