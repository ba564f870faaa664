"""Test the image as far as possible without Docker."""

import asyncio
import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from tests.conftest import TEST_SETTINGS
from tests.ipv6 import needs_ipv6
from tests.processes import ROOT, Processes


@dataclass(frozen=True)
class Instruction:
    name: str
    rest: str

    @property
    def words(self) -> list[str]:
        return [word for word in self.rest.split() if not word.startswith("--")]


def instructions(text: str) -> list[Instruction]:
    lines = re.sub(r"^\s*#.*\n", "", text, flags=re.MULTILINE).replace("\\\n", " ").splitlines()
    return [Instruction(*line.split(maxsplit=1)) for line in lines if line.strip()]


FILE = instructions((ROOT / "Dockerfile").read_text())
LAST_STAGE = FILE[max(index for index, instruction in enumerate(FILE) if instruction.name == "FROM") :]
COPIED = [
    source
    for instruction in FILE
    if instruction.name == "COPY" and "--from=" not in instruction.rest
    for source in instruction.words[:-1]
]  # fmt: skip
IGNORED = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if line and not line.startswith("#")]


def only(name: str) -> Instruction:
    (match,) = (instruction for instruction in LAST_STAGE if instruction.name == name)
    return match


def is_ignored(path: str) -> bool:
    """Return whether Docker ignores a path: the last pattern that matches it or a parent directory decides."""
    candidates = [path, *map(str, Path(path).parents)][:-1]
    ignored = False
    for line in IGNORED:
        pattern = line.removeprefix("!")
        patterns = {pattern, pattern.removeprefix("**/")}
        if any(fnmatch(candidate, glob) for candidate in candidates for glob in patterns):
            ignored = not line.startswith("!")
    return ignored


def test_an_older_engine_fetches_the_current_syntax() -> None:
    """A parser directive is effective in the first line only. HEALTHCHECK --start-interval needs Docker 25."""
    assert (ROOT / "Dockerfile").read_text().splitlines()[0] == "# syntax=docker/dockerfile:1"
    assert "--start-interval" in only("HEALTHCHECK").rest


@pytest.mark.parametrize("source", COPIED)
def test_a_copied_path_exists_and_is_not_ignored(source: str) -> None:
    assert (ROOT / source).exists()
    assert not is_ignored(source)


@pytest.mark.parametrize(
    "path",
    [
        ".env",
        ".git",
        ".data/postgres",
        ".venv/bin/python",
        "tests/conftest.py",
        "server/__pycache__/app.pyc",
    ],
)
def test_secrets_data_and_tests_are_ignored(path: str) -> None:
    assert is_ignored(path)


def test_the_builder_and_the_image_use_the_same_python() -> None:
    bases = [instruction.words[0] for instruction in FILE if instruction.name == "FROM"]
    assert len(bases) == 2
    assert set(bases) == {"python:3.11-slim-bookworm"}


def test_the_image_does_not_run_as_root() -> None:
    assert re.fullmatch(r"[1-9]\d*:[1-9]\d*", only("USER").rest)
    later = LAST_STAGE[LAST_STAGE.index(only("USER")) :]
    assert not {"RUN", "COPY"} & {instruction.name for instruction in later}


def test_the_image_runs_as_production_by_default() -> None:
    assert "APP_ENV=production" in only("ENV").words


def test_a_signal_reaches_python_itself() -> None:
    assert json.loads(only("ENTRYPOINT").rest) == ["python", "run.py"]
    assert json.loads(only("CMD").rest) == ["server"]


def test_the_copied_files_are_enough_to_migrate_and_describe(tmp_path: Path, empty_database_url: str) -> None:
    for source in COPIED:
        if (ROOT / source).is_dir():
            shutil.copytree(ROOT / source, tmp_path / source)
        else:
            shutil.copy(ROOT / source, tmp_path)
    stores = {
        "DATABASE_URL": empty_database_url,
        "MONGODB_URI": "mongodb://localhost/app",
        "REDIS_URL": "redis://localhost/0",
        "JWT_SECRET": "a" * 32,
        "JWT_REFRESH_SECRET": "b" * 32,
    }

    def run(*arguments: str) -> str:
        return subprocess.run(
            [sys.executable, *arguments],
            cwd=tmp_path,
            env={**os.environ, **TEST_SETTINGS, **stores},
            capture_output=True,
            text=True,
            check=True,
        ).stdout

    assert Path(run("-c", "import server; print(server.__file__)").strip()).is_relative_to(tmp_path)
    assert "applied: 0001" in run("run.py", "migrate")
    assert "/api/v1/projects" in run("run.py", "openapi")


def health_check(port: int, **settings: str) -> int:
    """Return the exit code of the image's health check for this port."""
    command = json.loads(only("HEALTHCHECK").rest.partition("CMD")[2])
    assert command[0] == "python"
    environment = {**os.environ, "PORT": str(port), **settings}
    return subprocess.run([sys.executable, *command[1:]], env=environment, stderr=subprocess.DEVNULL).returncode


async def test_a_server_that_answers_is_healthy(server: str) -> None:
    assert await asyncio.to_thread(health_check, urlsplit(server).port) == 0


@needs_ipv6
@pytest.mark.parametrize("host", ["::", "::1"])
async def test_a_server_that_answers_on_ipv6_only_is_healthy(processes: Processes, host: str) -> None:
    server = processes.server(HOST=host)
    assert await asyncio.to_thread(health_check, urlsplit(server.base).port, HOST=host) == 0


def test_a_server_that_does_not_answer_is_unhealthy(unused_tcp_port: int) -> None:
    assert health_check(unused_tcp_port) == 1
