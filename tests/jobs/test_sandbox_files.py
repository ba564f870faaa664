"""The workspace files beside a program: readable, but not writable."""

import pytest

from server.jobs import sandbox
from tests.jobs.runner import Runner, SandboxError

FILES = {
    "data.csv": "a,b\n1,2\n",
    "lib/shapes.py": "def area(): return 42\n",
    "lib/deep/er.txt": "down here",
    "ünï.txt": "é",
}


def test_program_reads_files_by_their_paths(runner: Runner) -> None:
    code = "for name in ('data.csv', 'lib/deep/er.txt', 'ünï.txt'): print(open(name).read())"
    assert runner.run(code, files=FILES).stdout == "a,b\n1,2\n\ndown here\né\n"


def test_program_imports_files(runner: Runner) -> None:
    outcome = runner.run(
        "import helper; from lib import shapes; print(helper.name, shapes.area())",
        files={
            **FILES,
            "helper.py": "name = 'helper'",
        },
    )
    assert (outcome.stdout, outcome.stderr) == ("helper 42\n", "")


def test_javascript_requires_files(runner: Runner, node: str) -> None:
    files = {"helper.js": "module.exports = 42"}
    assert runner.run("console.log(require('./helper'))", "javascript", files=files).stdout == "42\n"


def test_bash_reads_files(runner: Runner) -> None:
    assert runner.run("cat data.csv; ls", "bash", files=FILES).stdout == "a,b\n1,2\ndata.csv\nlib\nmain.sh\nünï.txt\n"


def test_files_cannot_be_changed(runner: Runner) -> None:
    code = """
import os
def attempt(name, operation):
    try: operation()
    except OSError: return
    print(name)
for path in ("data.csv", "../files/data.csv", "lib/shapes.py"):
    attempt("append", lambda: open(path, "a").write("x"))
    attempt("overwrite", lambda: open(path, "w"))
    attempt("truncate", lambda: os.truncate(path, 0))
attempt("remove", lambda: os.unlink("../files/data.csv"))
attempt("rename", lambda: os.rename("../files/data.csv", "mine"))
attempt("add", lambda: open("lib/other", "w"))
attempt("add a folder", lambda: os.mkdir("../files/other"))
try: os.chmod("../files/data.csv", 0o666); os.chmod("../files", 0o777)
except OSError: pass
attempt("append after chmod", lambda: open("data.csv", "a").write("x"))
print(open("data.csv").read() == "a,b\\n1,2\\n", sorted(os.listdir("../files")))
"""
    assert runner.run(code, files=FILES).stdout == "True ['data.csv', 'lib', 'ünï.txt']\n"


def test_program_may_replace_a_file_in_its_own_directory(runner: Runner) -> None:
    code = """
import os
os.unlink("data.csv")
open("data.csv", "w").write("mine")
print(open("data.csv").read(), open("../files/data.csv").read())
"""
    assert runner.run(code, files=FILES).stdout == "mine a,b\n1,2\n\n"


def test_program_takes_precedence_over_a_file_of_its_name(runner: Runner) -> None:
    outcome = runner.run("print(open('../files/main.py').read())", files={"main.py": "of the workspace"})
    assert outcome.stdout == "of the workspace\n"


@pytest.mark.parametrize(
    "path", ["/etc/evil", "../evil", "a/../../evil", "", ".", "x\0y", "a" * 300, "a/" * 600 + "b", ".."]
)
def test_path_outside_the_directory_is_rejected(runner: Runner, path: str) -> None:
    with pytest.raises(SandboxError, match="FilesRejected"):
        runner.run("print(1)", files={path: "x"})
    assert not list(runner.folder.rglob("job-*"))
    assert not list(runner.folder.rglob("evil"))


def test_conflicting_paths_are_rejected(runner: Runner) -> None:
    with pytest.raises(SandboxError, match="FilesRejected"):
        runner.run("print(1)", files={"a": "x", "a/b": "x"})


def test_too_many_files_are_rejected(runner: Runner) -> None:
    most = {f"{number}": "" for number in range(sandbox.MAX_INPUT_FILES)}
    assert runner.run("import os; print(len(os.listdir('../files')))", files=most).stdout == f"{len(most)}\n"
    with pytest.raises(SandboxError, match="FilesRejected"):
        runner.run("print(1)", files={**most, "one more": ""})


def test_too_many_bytes_of_files_are_rejected(runner: Runner) -> None:
    with pytest.raises(SandboxError, match="FilesRejected"):
        runner.run("print(1)", files={str(n): "x" * (sandbox.MAX_INPUT_BYTES // 8 + 1) for n in range(8)})


def test_files_do_not_count_as_the_programs_disk(runner: Runner) -> None:
    files = {str(number): "x" * (3 << 20) for number in range(4)}
    outcome = runner.run("import time; time.sleep(0.3); print('done')", files=files, disk_mb=8)
    assert outcome.stdout == "done\n"
