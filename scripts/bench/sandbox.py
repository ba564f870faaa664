"""What confinement costs: a hello in each tier beside the bare interpreter, in the same run.

``.venv/bin/python scripts/bench/sandbox.py [--runs N] [--at-once N]``. The two are timed in turns, so that a busy
machine slows both; medians. Run it as root and as somebody else: the tiers differ. It exits 1 when a tier costs more
than OVERHEAD_MS.
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
from server.jobs.programs import installed
from server.jobs.sandbox import Sandbox

HELLO = {"python": "print('hello')", "javascript": "console.log('hello')", "bash": "echo hello"}
OVERHEAD_MS = 30.0


async def main() -> int:
    options = arguments()
    os.nice(launcher.NICE)  # as all programs in the sandbox, or a busy machine would slow these only
    structlog.configure(logger_factory=structlog.PrintLoggerFactory(sys.stderr))
    commands = {language.name: language.command for language in reversed(installed())}
    print(f"{os.cpu_count()} processors, load {os.getloadavg()[0]:.1f}, uid {os.geteuid()}, {options.runs} runs each")
    print(f"{'tier':14} {'language':11} {'bare':>8} {'confined':>9} {'overhead':>9} {'hello/s':>8} {'at once':>8}")
    dear = False
    for tier in tiers.ours():
        box = await Sandbox.detect([tier])
        if not box.languages:
            print(f"{tier.name:14} does not hold here")
        for language in box.languages:
            overhead = await compare(box, language, commands[language], runs=options.runs, at_once=options.at_once)
            dear = dear or (language == "python" and overhead > OVERHEAD_MS)
        await box.close()
    return int(dear)


async def compare(box: Sandbox, language: str, command: tuple[str, ...], *, runs: int, at_once: int) -> float:
    """Milliseconds that the confinement adds."""
    code = HELLO[language]
    flag = "-e" if language == "javascript" else "-c"

    async def bare() -> None:
        process = await asyncio.create_subprocess_exec(
            *command, flag, code, stdin=asyncio.subprocess.DEVNULL, stdout=asyncio.subprocess.PIPE
        )
        assert await process.communicate() == (b"hello\n", None)

    async def confined() -> None:
        assert (await box.run(language, code)).stdout == "hello\n"

    without, within = [], []
    for _ in range(runs):
        without.append(await milliseconds(bare))
        within.append(await milliseconds(confined))

    async def one_after_the_other() -> None:
        for _ in range(runs // at_once):
            await confined()

    together = await milliseconds(lambda: asyncio.gather(*(one_after_the_other() for _ in range(at_once))))
    usual, dearer = statistics.median(without), statistics.median(within)
    print(
        f"{box.tier.name:14} {language:11} {usual:5.1f} ms {dearer:6.1f} ms {dearer - usual:6.1f} ms"
        f" {1000 / dearer:8.0f} {runs // at_once * at_once / together * 1000:8.0f}"
    )
    return dearer - usual


async def milliseconds(work: Callable[[], Awaitable[object]]) -> float:
    began = time.perf_counter()
    await work()
    return (time.perf_counter() - began) * 1000


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=60, help="hellos of each kind (60)")
    parser.add_argument("--at-once", type=int, default=4, help="programs side by side, for the last column (4)")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(uvloop.run(main()))
