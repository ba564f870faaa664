"""The generated document against the running server: whatever fits it, or just does not, is answered as it says."""

import asyncio
import subprocess
import sys
from pathlib import Path

import aiohttp

from tests.actors import Actor
from tests.processes import Processes

CHECKS = (
    "not_a_server_error",
    "status_code_conformance",
    "response_schema_conformance",
    "response_headers_conformance",
    "unsupported_method",
)
# They would end the session that the run lives on.
NOT_CALLED = ("logout", "delete_profile", "end_session", "end_other_sessions", "change_password")
SHORT_SECONDS, FULL_SECONDS = 10, 60


async def test_the_server_does_what_its_document_says(
    processes: Processes, http: aiohttp.ClientSession, tmp_path: Path, full: bool
) -> None:
    server = processes.server()
    actor = await Actor(http, server.base, "Fuzzer").register()
    command = [
        str(Path(sys.executable).parent / "schemathesis"),
        *("run", f"{server.base}/api-docs/swagger.json"),
        *("--header", f"Authorization: Bearer {actor.access_token}"),
        *("--checks", ",".join(CHECKS)),
        *("--workers", "1", "--seed", "1815", "--max-time", str(FULL_SECONDS if full else SHORT_SECONDS)),
        *(word for name in NOT_CALLED for word in ("--exclude-operation-id", name)),
    ]
    done = await asyncio.to_thread(
        subprocess.run, command, cwd=tmp_path, capture_output=True, text=True, timeout=FULL_SECONDS * 2, check=False
    )
    assert done.returncode == 0, done.stdout[-20_000:]
    assert "Traceback" not in server.output
