"""Child processes get the descriptors that are passed to them, and no other."""

import ast
import asyncio
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from server import child, loop

SERVER = Path(child.__file__).parent
OPEN = """
import os
def is_open(descriptor):
    try: return bool(os.fstat(descriptor))
    except OSError: return False
print([descriptor for descriptor in range(4096) if is_open(descriptor)])
"""
STARTERS = {"create_subprocess_exec", "create_subprocess_shell", "Popen", "run", "call", "check_call", "check_output"}


def starts_in(path: Path) -> list[ast.Call]:
    """Return the calls of the standard library that start a program."""
    return [
        node
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Attribute)
        and node.func.attr in STARTERS
        and isinstance(node.func.value, ast.Name)
        and node.func.value.id in ("asyncio", "subprocess")
        and not (node.func.value.id == "asyncio" and node.func.attr == "run")
    ]


def test_programs_of_the_loop_are_started_in_one_place() -> None:
    names = {path.name for path in SERVER.rglob("*.py") for call in starts_in(path) if "exec" in call.func.attr}  # type: ignore[attr-defined]
    assert names == {"child.py"}


def test_no_program_inherits_the_stdin_of_its_parent() -> None:
    for path in SERVER.rglob("*.py"):
        for call in starts_in(path):
            assert "stdin" in {keyword.arg for keyword in call.keywords}, f"{path}:{call.lineno}"


@pytest.fixture
def inheritable() -> Iterator[int]:
    """A descriptor that a child process gets unless it is closed."""
    reader, writer = os.pipe()
    os.set_inheritable(writer, True)
    yield writer
    os.close(reader)
    os.close(writer)


@pytest.mark.parametrize("run", [loop.run, asyncio.run], ids=["uvloop", "asyncio"])
def test_program_gets_its_streams_and_inherited_descriptors_only(run, inheritable: int, tmp_path: Path) -> None:
    async def listed(*inherit: int) -> bytes:
        process = await child.spawn_process(
            sys.executable, "-c", OPEN, stdout=subprocess.PIPE, stderr=2, inherit=inherit
        )
        return (await process.communicate())[0]

    assert run(listed()) == b"[0, 1, 2]\n"
    assert run(listed(inheritable)) == b"[0, 1, 2, %d]\n" % inheritable


def test_program_that_cannot_be_started_raises_an_error() -> None:
    with pytest.raises(FileNotFoundError):
        loop.run(child.spawn_process("/nowhere/program"))


def test_closed_standard_streams_become_the_null_device() -> None:
    code = """
import os
from server import child
log = os.fdopen(os.dup(1), "w")
for number in (0, 1, 2): os.close(number)
child.open_standard_streams()
print(os.open("/dev/zero", os.O_RDONLY), file=log)
"""
    completed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(completed.stdout) > 2
