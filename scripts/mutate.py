"""Run mutation tests of the modules that decide about access: see scripts/mutate.

cosmic-ray makes the mutants and runs the tests in copies of the checkout: one copy for each processor. The stores of a
copy run until the end, because there are many short test runs.
"""

import argparse
import ast
import contextlib
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
import tomllib
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from queue import Queue

from cosmic_ray.work_db import WorkDB, use_db
from cosmic_ray.work_item import MutationSpec, TestOutcome, WorkerOutcome, WorkResult

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from server import migrations  # noqa: E402
from server.devstack.stack import Stack  # noqa: E402

RUN_TIMEOUT_SECONDS = 3600
TEST_TIMEOUT_SECONDS = 120.0  # of the tests of one mutant; a mutant that hangs counts as detected
CONFIG = """
[cosmic-ray]
module-path = "{module}"
timeout = {timeout}
excluded-modules = []
test-command = "{command}"
distributor.name = "local"
"""
SKIPPED = WorkResult(worker_outcome=WorkerOutcome.SKIPPED)


@dataclass(frozen=True)
class Target:
    """A module with its narrow tests. ``functions`` limits the mutants to these functions; empty means all."""

    module: str
    tests: tuple[str, ...]
    functions: tuple[str, ...] = ()


@dataclass(frozen=True)
class Mutant:
    """A mutant that survived: the lines that it removed and added."""

    module: str
    lines: str

    @classmethod
    def of(cls, target: Target, result: WorkResult) -> "Mutant":
        lines = (result.diff or "").splitlines()
        changed = [line for line in lines if line.startswith(("-", "+")) and not line.startswith(("---", "+++"))]
        return cls(target.module, "\n".join(f"{line[0]} {line[1:].strip()}" for line in changed))


@dataclass
class TargetReport:
    tried: int = 0
    not_run: int = 0  # because the time was over
    survivors: tuple[Mutant, ...] = ()


def main() -> int:
    options = parse_arguments()
    plan = tomllib.loads((ROOT / "scripts/mutate.toml").read_text())
    targets = [
        Target(target["module"], tuple(target["tests"]), tuple(target.get("functions", ())))
        for target in plan["target"]
    ]
    known = {
        Mutant(survivor["module"], survivor["change"].strip()): survivor["reason"]
        for survivor in plan.get("survivor", ())
    }
    selected = [target for target in targets if not options.modules or target.module in options.modules]
    if len(selected) < len(options.modules):
        sys.exit(f"choose from: {' '.join(target.module for target in targets)}")
    deadline = time.monotonic() + options.seconds
    reports = run_all(selected, deadline)
    return print_reports(selected, reports, known)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="scripts/mutate")
    parser.add_argument("--seconds", type=float, default=RUN_TIMEOUT_SECONDS)
    parser.add_argument("modules", nargs="*")
    return parser.parse_args()


def run_all(targets: Sequence[Target], deadline: float) -> list[TargetReport]:
    """Run each target on its own copy of the checkout, as many at once as there are processors."""
    workers = min(len(targets), os.cpu_count() or 1)
    with contextlib.ExitStack() as stack:
        copies: Queue[Path] = Queue()
        for _ in range(workers):  # only the main thread starts stores
            copies.put(stack.enter_context(checkout_copy()))

        def run(target: Target) -> TargetReport:
            copy = copies.get()
            try:
                return run_target(target, copy, deadline)
            finally:
                copies.put(copy)

        with ThreadPoolExecutor(workers) as pool:
            return list(pool.map(run, targets))


@contextlib.contextmanager
def checkout_copy() -> Iterator[Path]:
    """Yield a directory with a copy of the checkout, without files that git ignores, and its running stores."""
    with tempfile.TemporaryDirectory(prefix="mutate-", ignore_cleanup_errors=True) as folder:
        directory = Path(folder)
        directory.chmod(0o711)  # PostgreSQL of root runs as another user, who must reach its files
        files = subprocess.run(
            ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
            cwd=ROOT,
            capture_output=True,
            check=True,
        ).stdout
        for name in filter(None, files.decode().split("\0")):
            (directory / "copy" / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, directory / "copy" / name)
        with Stack(directory / "data") as stack:
            migrations.apply(stack.postgres.url)
            yield directory


def run_target(target: Target, directory: Path, deadline: float) -> TargetReport:
    copy = directory / "copy"
    session, config = directory / "session.sqlite", directory / "config.toml"
    tests = f"{sys.executable} -m pytest -x -q -p no:cacheprovider -p no:xdist {' '.join(target.tests)}"
    config.write_text(CONFIG.format(module=target.module, timeout=TEST_TIMEOUT_SECONDS, command=tests))
    session.unlink(missing_ok=True)
    environment = {**os.environ, "TEST_STACK": str(directory / "data"), "PYTHONPATH": str(copy)}
    print_progress(f"{target.module}: run the tests without a change")
    started = time.monotonic()
    subprocess.run(tests.split(), cwd=copy, env=environment, stdout=subprocess.DEVNULL, check=True)
    print_progress(f"{target.module}: {time.monotonic() - started:.1f} s")
    cosmic_ray = [sys.executable, "-m", "cosmic_ray.cli"]
    subprocess.run([*cosmic_ray, "init", str(config), str(session)], cwd=copy, check=True, capture_output=True)
    with use_db(session, WorkDB.Mode.open) as db:
        skip_equivalent_mutants(db, target, (copy / target.module).read_text())
        todo = len(db.pending_work_items)
    print_progress(f"{target.module}: {todo} changes")
    process = subprocess.Popen([*cosmic_ray, "exec", str(config), str(session)], cwd=copy, env=environment)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(timeout=max(1.0, deadline - time.monotonic()))
    process.terminate()
    process.wait()
    return read_report(target, session, todo)


def read_report(target: Target, session: Path, todo: int) -> TargetReport:
    with use_db(session, WorkDB.Mode.open) as db:
        results = [result for _, result in db.results if result.worker_outcome is not WorkerOutcome.SKIPPED]
    survivors = {Mutant.of(target, result) for result in results if result.test_outcome is TestOutcome.SURVIVED}
    ordered = tuple(sorted(survivors, key=lambda change: change.lines))
    return TargetReport(tried=len(results), not_run=todo - len(results), survivors=ordered)


def skip_equivalent_mutants(db: WorkDB, target: Target, source: str) -> None:
    """Skip the mutants that cannot change the behaviour, and those outside the target's functions.

    cosmic-ray takes annotations, the star of keyword-only parameters and ``__all__`` for operators and values.
    """
    tree = ast.parse(source)
    annotations = [span for node in ast.walk(tree) for span in annotations_of(node)]
    operators = {
        (node.left.end_lineno, node.left.end_col_offset) for node in ast.walk(tree) if isinstance(node, ast.BinOp)
    }
    for item in db.pending_work_items:
        [mutation] = item.mutations
        is_operator = "BinaryOperator" in mutation.operator_name
        if (
            any(begin <= mutation.start_pos < end for begin, end in annotations)
            or (is_operator and not follows_operand(mutation, operators))
            or (target.functions and not is_in_functions(mutation, target.functions, source))
        ):
            db.set_result(item.job_id, SKIPPED)


Span = tuple[tuple[int, int], tuple[int, int]]


def annotations_of(node: ast.AST) -> Iterator[Span]:
    annotations = [getattr(node, "annotation", None), getattr(node, "returns", None)]
    for annotation in annotations:
        if isinstance(annotation, ast.expr):
            yield (
                (annotation.lineno, annotation.col_offset),
                (annotation.end_lineno or 0, annotation.end_col_offset or 0),
            )


def follows_operand(mutation: MutationSpec, operands: set[tuple[int | None, int | None]]) -> bool:
    """Return whether only white space and brackets are between a left operand and the operator."""
    line, column = mutation.start_pos
    return any(end[0] == line and end[1] is not None and 0 <= column - end[1] <= 2 for end in operands) or any(
        end[0] == line - 1 for end in operands
    )


def is_in_functions(mutation: MutationSpec, functions: Sequence[str], source: str) -> bool:
    """Return whether the mutant changes one of these functions, or removes a decorator that restricts its callers."""
    if mutation.definition_name is None:
        return source.splitlines()[mutation.start_pos[0] - 1].startswith("@requires")
    return mutation.definition_name.rpartition(".")[2] in functions


def print_reports(targets: Sequence[Target], reports: Sequence[TargetReport], known: dict[Mutant, str]) -> int:
    """Print the survivors. Return 1 if a survivor is not known, or if a test detects a known one now; else 0."""
    failed = False
    for target, report in zip(targets, reports, strict=True):
        unknown = [change for change in report.survivors if change not in known]
        detected = [change for change in known if change.module == target.module and change not in report.survivors]
        print(f"{target.module}: {report.tried} changes, {len(report.survivors)} survived, {len(unknown)} are unknown")
        if report.not_run:
            print(f"  {report.not_run} not tested: the time was over")
            detected = []
        for title, changes in (("survived", unknown), ("known survivor that a test detects now", detected)):
            for change in changes:
                failed = True
                print(f"  {title}:\n    " + change.lines.replace("\n", "\n    "))
    return int(failed)


_print_lock = threading.Lock()


def print_progress(text: str) -> None:
    with _print_lock:
        print(f"mutate: {text}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
