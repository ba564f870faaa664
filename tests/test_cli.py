"""The commands of run.py: every error is reported in one line that names its cause."""

import asyncio
import contextlib
import re
import signal
import socket
from collections.abc import Iterator

import orjson
import pytest

from server import json
from server.app import swagger_document
from tests.processes import Process, Processes
from tests.timeouts import PROCESS_TIMEOUT_SECONDS

GOOD_SECRETS = {"JWT_SECRET": "a" * 32, "JWT_REFRESH_SECRET": "b" * 32}
PRODUCTION = {"APP_ENV": "production", "BCRYPT_ROUNDS": "10", "CORS_ORIGIN": "https://example.org", **GOOD_SECRETS}


def complaint(process: Process) -> str:
    """Wait until the process fails; return the only line of its output."""
    assert process.wait(seconds=PROCESS_TIMEOUT_SECONDS) == 1, process.output
    lines = process.output.strip().splitlines()
    assert len(lines) == 1, process.output
    return lines[0]


@contextlib.contextmanager
def silent_port() -> Iterator[int]:
    """Listen on a port and never respond."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        yield listener.getsockname()[1]


def test_a_taken_port_is_named(processes: Processes) -> None:
    with silent_port() as port:
        assert complaint(processes.server(PORT=str(port))) == (
            f"error: Cannot listen on 127.0.0.1:{port}: Address already in use"
        )


def test_invalid_address_is_named(processes: Processes) -> None:
    unknown_host = processes.server(HOST="nobody.invalid")
    unquoted = processes.worker(MONGODB_URI="mongodb://us:er:hidden@127.0.0.1/app")
    assert re.fullmatch(r"error: Cannot listen on nobody\.invalid:0: .*(known|resolution).*", complaint(unknown_host))
    line = complaint(unquoted)
    assert line.startswith("error: MongoDB at 127.0.0.1 cannot be used: ")
    assert "hidden" not in line


def test_production_requires_secrets(processes: Processes) -> None:
    missing = processes.server(**PRODUCTION | {"JWT_SECRET": ""})
    short = processes.worker(**PRODUCTION | {"JWT_REFRESH_SECRET": "short"})
    assert complaint(missing) == 'error: Environment variable "JWT_SECRET" not set'
    assert '"JWT_REFRESH_SECRET" invalid: Must have at least 32 bytes' in complaint(short)


@pytest.mark.parametrize(
    ("setting", "address", "name"),
    [
        ("DATABASE_URL", "postgresql://app:hidden@127.0.0.1:{port}/app", "PostgreSQL"),
        ("REDIS_URL", "redis://:hidden@127.0.0.1:{port}/0", "Redis"),
        ("MONGODB_URI", "mongodb://app:hidden@127.0.0.1:{port}/app", "MongoDB"),
    ],
)
def test_store_that_is_down_or_hangs_at_start_is_named(
    setting: str, address: str, name: str, processes: Processes, unused_tcp_port: int
) -> None:
    with silent_port() as silent:
        ends = [
            (port, processes.command(command, **{setting: address.format(port=port)}))
            for command in ("server", "worker")
            for port in (unused_tcp_port, silent)
        ]
        for port, process in ends:
            line = complaint(process)
            assert line.startswith("error: "), line
            assert f"{name} at 127.0.0.1:{port} cannot be used" in line, line
            assert "hidden" not in line


def test_a_server_does_not_start_on_an_old_schema(processes: Processes, empty_database_url: str) -> None:
    line = complaint(processes.server(DATABASE_URL=empty_database_url))
    assert re.fullmatch(r"error: \d+ migrations are pending; run: python run.py migrate", line)


def test_migrate_applies_what_check_finds_pending(processes: Processes, empty_database_url: str) -> None:
    def migrate(*arguments: str) -> tuple[int, str]:
        process = processes.command("migrate", *arguments, DATABASE_URL=empty_database_url)
        return process.wait(), process.output.strip()

    status, output = migrate("--check")
    assert status == 1
    assert output.startswith("pending: 0001.users\n")
    assert migrate()[1].startswith("applied: 0001.users\n")
    assert migrate("--check") == (0, "no pending migrations")
    assert migrate() == (0, "no migrations to apply")


def test_two_deploys_may_migrate_at_once(processes: Processes, empty_database_url: str) -> None:
    both = [processes.command("migrate", DATABASE_URL=empty_database_url) for _ in range(2)]
    assert [process.wait() for process in both] == [0, 0]
    assert sorted(process.output.split(":")[0].strip() for process in both) == ["applied", "no migrations to apply"]


def test_openapi_prints_the_document_that_is_served(processes: Processes) -> None:
    process = processes.command("openapi")
    assert process.wait() == 0
    assert orjson.loads(process.output) == orjson.loads(json.dumps(swagger_document()))


@pytest.mark.parametrize("command", [(), ("server",), ("worker",), ("dev",), ("migrate",), ("openapi",)])
def test_each_command_explains_itself(command: tuple[str, ...], processes: Processes) -> None:
    process = processes.command(*command, "--help")
    assert process.wait() == 0
    assert process.output.startswith(" ".join(("usage: run.py", *command)))


def test_unknown_command_prints_the_usage(processes: Processes) -> None:
    process = processes.command("serve")
    assert process.wait() == 2
    assert "choose from" in process.output


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_server_reports_readiness_and_shuts_down_gracefully(number: int, processes: Processes) -> None:
    server = processes.server()
    assert server.base.startswith("http://127.0.0.1:")
    assert await asyncio.to_thread(server.terminate, number=number) == 0
    assert "server stopped" in server.output
    assert "Traceback" not in server.output
