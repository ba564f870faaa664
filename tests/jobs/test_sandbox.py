"""A program in every tier of the sandbox: its input, exit, limits and cancellation."""

import time
from collections.abc import Callable
from pathlib import Path
from uuid import uuid4

import pytest

from tests.jobs.runner import Runner, SandboxError, processes_with, wait_until_no_process
from tests.timeouts import WAIT_TIMEOUT_SECONDS

MIB = 1 << 20
HELLO = {
    "python": "print('hello')",
    "javascript": "console.log('hello')",
    "bash": "echo hello",
}
# Prints its input and its arguments, and exits with 7.
TALK = {
    "python": "import sys; print(sys.stdin.read(), sys.argv[1:]); print('oh', file=sys.stderr); sys.exit(7)",
    "javascript": "console.log(require('fs').readFileSync(0, 'utf8'), process.argv.slice(2));"
    "console.error('oh'); process.exit(7)",
    "bash": """echo "$(cat) ['$1', '$2']"; echo oh >&2; exit 7""",
}


@pytest.fixture(params=sorted(HELLO))
def language(request: pytest.FixtureRequest, runner: Runner) -> str:
    if request.param == "javascript" and request.param not in runner.languages:
        request.getfixturevalue("node")
    assert request.param in runner.languages
    name: str = request.param
    return name


def test_program_runs_in_every_language(runner: Runner, language: str) -> None:
    outcome = runner.run(HELLO[language], language)
    assert (outcome.stdout, outcome.stderr) == ("hello\n", "")
    assert (outcome.exit_code, outcome.signal) == (0, None)
    assert (outcome.truncated, outcome.timed_out, outcome.out_of_memory) == (False, False, False)
    assert outcome.sandbox == runner.tier
    assert outcome.duration_ms > 0
    assert outcome.max_rss_kb > 500


def test_program_receives_stdin_and_arguments_and_returns_its_exit_code(runner: Runner, language: str) -> None:
    outcome = runner.run(TALK[language], language, stdin="grüß\n", args=["a b", "-c"])
    assert "".join(outcome.stdout.split()) == "grüß['ab','-c']"
    assert outcome.stderr == "oh\n"
    assert outcome.exit_code == 7


@pytest.mark.parametrize("code", [0, 1, 2, 125, 126, 127, 128, 130, 137, 143, 255])
def test_exit_code_is_reported_unchanged(runner: Runner, code: int) -> None:
    outcome = runner.run(f"exit {code}", "bash")
    assert (outcome.exit_code, outcome.signal) == (code, None)


@pytest.mark.parametrize("number", [6, 9, 11, 15])
def test_program_killed_by_a_signal_has_no_exit_code(runner: Runner, number: int) -> None:
    outcome = runner.run(f"import os; os.kill(os.getpid(), {number})")
    assert (outcome.exit_code, outcome.signal) == (None, number)
    assert not outcome.timed_out
    assert not outcome.out_of_memory


def test_abort_is_a_signal(runner: Runner) -> None:
    assert runner.run("import os; os.abort()").signal == 6


def test_syntax_error_is_printed_to_stderr(runner: Runner) -> None:
    outcome = runner.run("this is no python")
    assert outcome.exit_code == 1
    assert "SyntaxError" in outcome.stderr


@pytest.mark.parametrize("code", ["while True: pass", "import time; time.sleep(600)"], ids=["busy", "idle"])
def test_time_limit_ends_the_program(runner: Runner, code: str) -> None:
    outcome = runner.run(f"print('here', flush=True)\n{code}", timeout_seconds=3)
    assert outcome.timed_out
    assert not outcome.out_of_memory
    assert outcome.stdout == "here\n"  # output before the limit is kept
    assert outcome.duration_ms >= 2950


def test_program_within_its_memory_limit_completes(runner: Runner) -> None:
    outcome = runner.run("data = bytearray(70 << 20); print(len(data))", memory_mb=128)
    assert outcome.stdout == f"{70 << 20}\n"
    assert not outcome.out_of_memory
    assert outcome.max_rss_kb > 70 << 10


ALLOCATIONS = {
    "at once": "data = bytearray(10 << 30)",
    "bit by bit": "data = []\nwhile True: data.append(bytearray(1 << 20))",
    "in many processes": """
import os, time
for _ in range(6):
    if os.fork() == 0:
        data = bytearray(os.urandom(1 << 20) * 40)
        time.sleep(600)
time.sleep(600)
""",
}


@pytest.mark.parametrize("code", ALLOCATIONS.values(), ids=list(ALLOCATIONS))
def test_memory_limit_ends_the_program(runner: Runner, code: str) -> None:
    outcome = runner.run(code, memory_mb=128)
    assert outcome.out_of_memory
    assert not outcome.timed_out
    assert outcome.exit_code != 0
    assert outcome.max_rss_kb < 512 << 10


def test_the_memory_limit_of_javascript_is_not_its_address_space(runner: Runner, node: str) -> None:
    assert runner.run("console.log(1)", "javascript", memory_mb=64).stdout == "1\n"
    greedy = "const all = []; for (;;) all.push(Buffer.alloc(1 << 20, 1))"
    outcome = runner.run(greedy, "javascript", memory_mb=128)
    assert outcome.out_of_memory
    assert not outcome.timed_out


def test_each_stream_is_truncated_at_one_mebibyte(runner: Runner) -> None:
    code = "import sys\nfor _ in range(3 << 10): sys.stdout.write('o' * 1024); sys.stderr.write('e' * 1024)"
    outcome = runner.run(code)
    assert outcome.truncated
    assert outcome.exit_code == 0  # truncation does not stop the program
    assert (outcome.stdout, outcome.stderr) == ("o" * MIB, "e" * MIB)


def test_output_of_exactly_a_mebibyte_is_whole(runner: Runner) -> None:
    outcome = runner.run(f"print('x' * {MIB}, end='')")
    assert (len(outcome.stdout), outcome.truncated) == (MIB, False)


def test_output_that_is_not_utf8_becomes_text(runner: Runner) -> None:
    outcome = runner.run(r"import os; os.write(1, b'a\xff\xfe\xc3'); os.write(1, b'\xa9 \xe2\x82')")
    assert outcome.stdout == "a\ufffd\ufffdé \ufffd"


def test_output_is_passed_on_while_the_program_runs(runner: Runner) -> None:
    job = runner.start("import time; print('early', flush=True); time.sleep(600)")
    assert job.wait_for_output().startswith("early")
    job.cancel()


def test_unread_stdin_does_not_block_the_program(runner: Runner) -> None:
    outcome = runner.run("print('done')", stdin="x" * (4 * MIB))
    assert (outcome.stdout, outcome.exit_code) == ("done\n", 0)


def test_closed_output_does_not_end_the_program(runner: Runner) -> None:
    code = "import os, time; os.close(1); time.sleep(0.3); os.write(2, b'still here')"
    assert runner.run(code).stderr == "still here"


def test_programs_run_concurrently(runner: Runner) -> None:
    jobs = [runner.start(f"print({number})") for number in range(8)]
    assert [job.result().stdout for job in jobs] == [f"{number}\n" for number in range(8)]


def test_each_program_begins_in_an_empty_directory_that_is_removed(runner: Runner) -> None:
    list_directory = "import os; print(os.listdir('.')); open('left', 'w').write('x')"
    assert [runner.run(list_directory).stdout for _ in range(2)] == ["['main.py']\n"] * 2
    assert jobs_of(runner) == []


def test_unknown_language_is_rejected(runner: Runner) -> None:
    with pytest.raises(SandboxError):
        runner.run("x", "cobol")


def test_cancel_ends_all_processes(runner: Runner) -> None:
    word = f"marker-{uuid4().hex}"
    code = "import os, time; [os.fork() for _ in range(3)]; print('up', flush=True); time.sleep(600)"
    job = runner.start(code, args=[word], timeout_seconds=60)
    job.wait_for_output()
    assert processes_with(word)
    job.cancel()
    assert wait_until_no_process(word)
    assert jobs_of(runner) == []


def test_a_cancel_right_after_the_start_leaves_nothing(runner: Runner) -> None:
    word = f"marker-{uuid4().hex}"
    for pause in range(12):
        job = runner.start("import time; time.sleep(600)", args=[word], timeout_seconds=60)
        time.sleep(pause / 400)
        job.cancel()
    assert wait_until_no_process(word)
    assert jobs_of(runner) == []


def test_a_killed_worker_leaves_no_process_and_no_directory(own_runner: Runner) -> None:
    word = f"marker-{uuid4().hex}"
    code = "import os, time; [os.fork() for _ in range(3)]; print('up', flush=True); time.sleep(600)"
    for job in [own_runner.start(code, args=[word], timeout_seconds=60) for _ in range(3)]:
        job.wait_for_output()
    until(lambda: len(processes_with(word)) >= 24)
    own_runner.kill()
    assert wait_until_no_process(word)
    until(lambda: not list(own_runner.folder.glob("sandbox-*")))


def until(condition: Callable[[], bool], *, seconds: float = WAIT_TIMEOUT_SECONDS) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def jobs_of(runner: Runner) -> list[Path]:
    """Return the directories of the runner's jobs."""
    return [path for path in runner.folder.rglob("job-*") if path.is_dir()]
