"""Measure the overhead of the sandbox: a hello program in each tier against the bare interpreter.

``.venv/bin/python scripts/bench/sandbox.py [--runs N] [--at-once N]``. Sandboxed and bare runs alternate, so that a
busy machine slows down both; the figures are medians. Run it as root and as another user, because the tiers differ. It
exits with 1 if Python in a tier costs more than ``MAX_OVERHEAD_MS``.
"""

import argparse
import asyncio
import os
import statistics
import sys
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

import structlog
import uvloop

sys.path.insert(0, str(Path(__file__).parents[2]))

from server.jobs import launcher, tiers
from server.jobs.languages import installed_languages
from server.jobs.sandbox import Sandbox

HELLO = {"python": "print('hello')", "javascript": "console.log('hello')", "bash": "echo hello"}
MAX_OVERHEAD_MS = 30.0


async def main() -> int:
    options = arguments()
    os.nice(launcher.NICE)  # as programs in the sandbox run; else a busy machine would slow down only those
    structlog.configure(logger_factory=structlog.PrintLoggerFactory(sys.stderr))
    commands = {language.name: language.command for language in reversed(installed_languages())}
    print(f"{os.cpu_count()} processors, load {os.getloadavg()[0]:.1f}, uid {os.geteuid()}, {options.runs} runs each")
    print(f"{'tier':14} {'language':11} {'bare':>8} {'confined':>9} {'overhead':>9} {'hello/s':>8} {'at once':>8}")
    is_over_limit = False
    for tier in tiers.tiers_for_current_user():
        sandbox = await Sandbox.detect([tier])
        if not sandbox.languages:
            print(f"{tier.name:14} is not available here")
        for language in sandbox.languages:
            overhead = await compare(sandbox, language, commands[language], runs=options.runs, at_once=options.at_once)
            is_over_limit = is_over_limit or (language == "python" and overhead > MAX_OVERHEAD_MS)
        await sandbox.close()
    return int(is_over_limit)


async def compare(sandbox: Sandbox, language: str, command: tuple[str, ...], *, runs: int, at_once: int) -> float:
    """Print the figures of a language in a sandbox, and return the overhead in milliseconds."""
    code = HELLO[language]
    flag = "-e" if language == "javascript" else "-c"

    async def bare() -> None:
        process = await asyncio.create_subprocess_exec(
            *command, flag, code, stdin=asyncio.subprocess.DEVNULL, stdout=asyncio.subprocess.PIPE
        )
        assert await process.communicate() == (b"hello\n", None)

    async def confined() -> None:
        assert (await sandbox.run(language, code)).stdout == "hello\n"

    bare_times, confined_times = [], []
    for _ in range(runs):
        bare_times.append(await elapsed_milliseconds(bare))
        confined_times.append(await elapsed_milliseconds(confined))

    async def run_in_sequence() -> None:
        for _ in range(runs // at_once):
            await confined()

    total_time = await elapsed_milliseconds(lambda: asyncio.gather(*(run_in_sequence() for _ in range(at_once))))
    bare_median, confined_median = statistics.median(bare_times), statistics.median(confined_times)
    print(
        f"{sandbox.tier.name:14} {language:11} {bare_median:5.1f} ms {confined_median:6.1f} ms"
        f" {confined_median - bare_median:6.1f} ms"
        f" {1000 / confined_median:8.0f} {runs // at_once * at_once / total_time * 1000:8.0f}"
    )
    return confined_median - bare_median


async def elapsed_milliseconds(work: Callable[[], Awaitable[object]]) -> float:
    started = time.perf_counter()
    await work()
    return (time.perf_counter() - started) * 1000


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=60, help="runs of each kind (60)")
    parser.add_argument("--at-once", type=int, default=4, help="concurrent programs in the last column (4)")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(uvloop.run(main()))
