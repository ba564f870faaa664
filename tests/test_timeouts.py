"""No test depends on the speed of the machine: waits have long timeouts, and no test asserts a short duration."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.timeouts import WAIT_TIMEOUT_SECONDS

TESTS = Path(__file__).parent
CLOCKS = {"monotonic", "perf_counter"}  # thread_time and process_time do not count the load of other processes
WAITS = {
    "assert_push",
    "closed",
    "finished_job",
    "all_exited",
    "wait_for_change",
    "next",
    "receive",
    "terminate",
    "until",
    "wait",
    "wait_for_output",
}
NOTHING_COMES = 1.0  # a shorter wait is for an event that must not come


def name_of(call: ast.AST) -> str:
    function = call.func if isinstance(call, ast.Call) else None
    return function.attr if isinstance(function, ast.Attribute) else getattr(function, "id", "")


def holds_a_figure(compared: ast.Compare) -> bool:
    """Return whether a comparison requires a duration to be short."""
    sides = [compared.left, *compared.comparators]
    small = {ast.Lt: 0, ast.LtE: 0, ast.Gt: 1, ast.GtE: 1}
    pairs = [pair[small[type(op)]] for op, *pair in zip(compared.ops, sides, sides[1:]) if type(op) in small]  # noqa: B905
    return any(
        isinstance(side, ast.BinOp) and isinstance(side.op, ast.Sub) and name_of(side.left) in CLOCKS for side in pairs
    )


def limits_of(call: ast.Call) -> Iterator[object]:
    name = name_of(call)
    if name in ("timeout", "wait_for"):
        yield from (argument.value for argument in call.args[-1:] if isinstance(argument, ast.Constant))
    if name in WAITS:
        yield from (
            argument.value.value
            for argument in call.keywords
            if argument.arg in ("seconds", "timeout") and isinstance(argument.value, ast.Constant)
        )


def hurries(code: str) -> list[int]:
    """Return the lines that depend on a fast machine."""
    lines = []
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.Assert) and any(
            holds_a_figure(comparison) for comparison in ast.walk(node.test) if isinstance(comparison, ast.Compare)
        ):
            lines.append(node.lineno)
        if isinstance(node, ast.Call) and any(
            isinstance(limit, int | float) and NOTHING_COMES <= limit < WAIT_TIMEOUT_SECONDS
            for limit in limits_of(node)
        ):
            lines.append(node.lineno)
    return lines


@pytest.mark.parametrize(
    ("code", "hurried"),
    [
        ("assert time.monotonic() - began < 2", True),
        ("assert 2 > time.perf_counter() - began", True),
        ("assert time.monotonic() - began >= 8", False),
        ("assert len(heard) <= (time.monotonic() - began) * 30 + 1", False),
        ("asyncio.timeout(5)", True),
        ("asyncio.wait_for(done, 5)", True),
        ("asyncio.timeout(0.01)", False),
        ("all_exited(pids, seconds=1)", True),
        ("all_exited(pids, seconds=WAIT_TIMEOUT_SECONDS)", False),
    ],
)
def test_check_detects_dependence_on_machine_speed(code: str, hurried: bool) -> None:
    assert bool(hurries(code)) == hurried


def test_no_test_depends_on_machine_speed() -> None:
    lines_by_path = {str(path.relative_to(TESTS)): hurries(path.read_text()) for path in TESTS.rglob("*.py")}
    assert {name: lines for name, lines in lines_by_path.items() if lines} == {}
