"""No test depends on how fast the machine is: what is waited for is waited for patiently, and no figure is held."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.patience import PATIENCE_SECONDS

TESTS = Path(__file__).parent
CLOCKS = {"monotonic", "perf_counter"}  # thread_time and process_time do not count what others take of the machine
WAITS = {"assert_push", "closed", "finished_job", "gone", "has_heard", "next", "receive", "terminate", "until", "wait"}
NOTHING_COMES = 1.0  # a wait that is shorter is for what must not come


def name_of(call: ast.AST) -> str:
    function = call.func if isinstance(call, ast.Call) else None
    return function.attr if isinstance(function, ast.Attribute) else getattr(function, "id", "")


def holds_a_figure(compared: ast.Compare) -> bool:
    """Whether the time that something took is to be small."""
    sides = [compared.left, *compared.comparators]
    small = {ast.Lt: 0, ast.LtE: 0, ast.Gt: 1, ast.GtE: 1}
    pairs = [pair[small[type(op)]] for op, *pair in zip(compared.ops, sides, sides[1:]) if type(op) in small]  # noqa: B905
    return any(
        isinstance(side, ast.BinOp) and isinstance(side.op, ast.Sub) and name_of(side.left) in CLOCKS for side in pairs
    )


def limits_of(call: ast.Call) -> Iterator[object]:
    name = name_of(call)
    if name in ("timeout", "wait_for"):
        yield from (each.value for each in call.args[-1:] if isinstance(each, ast.Constant))
    if name in WAITS:
        yield from (
            each.value.value
            for each in call.keywords
            if each.arg in ("seconds", "timeout") and isinstance(each.value, ast.Constant)
        )


def hurries(code: str) -> list[int]:
    """The lines that take the machine for a fast one."""
    found = []
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.Assert) and any(
            holds_a_figure(each) for each in ast.walk(node.test) if isinstance(each, ast.Compare)
        ):
            found.append(node.lineno)
        if isinstance(node, ast.Call) and any(
            isinstance(limit, int | float) and NOTHING_COMES <= limit < PATIENCE_SECONDS for limit in limits_of(node)
        ):
            found.append(node.lineno)
    return found


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
        ("gone(pids, seconds=1)", True),
        ("gone(pids, seconds=PATIENCE_SECONDS)", False),
    ],
)
def test_what_hurries_is_told_from_what_does_not(code: str, hurried: bool) -> None:
    assert bool(hurries(code)) == hurried


def test_no_test_hurries() -> None:
    found = {str(path.relative_to(TESTS)): hurries(path.read_text()) for path in TESTS.rglob("*.py")}
    assert {name: lines for name, lines in found.items() if lines} == {}
