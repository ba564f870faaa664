"""The OpenAPI document against the running server: requests that conform, or just do not, get documented responses."""

import asyncio
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import aiohttp

from tests.actors import Actor
from tests.processes import Processes
from tests.test_roles import resource_ids_of

CHECKS = (
    "not_a_server_error",
    "status_code_conformance",
    "response_schema_conformance",
    "response_headers_conformance",
    "unsupported_method",
)
# These would end the session of the run.
NOT_CALLED = {"logout", "delete_profile", "end_session", "end_other_sessions", "change_password"}
UNKNOWN = {"accept_invitation", "read_artifact"}  # a token cannot be guessed; the file does not exist
SHORT_SECONDS, FULL_SECONDS = 10, 60


async def test_the_server_does_what_its_document_says(
    processes: Processes, http: aiohttp.ClientSession, tmp_path: Path, full: bool
) -> None:
    server = processes.server()
    actor = await Actor(http, server.base, "Fuzzer").register()
    document = (await actor.get("/api-docs/swagger.json")).body
    await name_things(document, actor)
    named = tmp_path / "swagger.json"
    named.write_text(json.dumps(document))
    command = [
        str(Path(sys.executable).parent / "schemathesis"),
        *("run", str(named), "--url", server.base),
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
    nothing, called = operations_without_success(document, server.output)
    assert nothing <= UNKNOWN
    operations = [operation for methods in document["paths"].values() for operation in methods.values()]
    every = {operation["operationId"] for operation in operations} - NOT_CALLED
    assert called >= every if full else called  # the number of calls in the short form depends on the machine


async def name_things(document: dict[str, Any], actor: Actor) -> None:
    """Put the ids of existing resources into every path; operations that delete get resources of their own."""
    ids_to_keep = await resource_ids_of(actor)
    for path, methods in document["paths"].items():
        for method, operation in methods.items():
            ids = await resource_ids_of(actor) if method == "delete" and "{" in path else ids_to_keep
            for parameter in operation["parameters"]:
                if parameter["in"] == "path":
                    parameter["enum"] = [ids[parameter["name"]]]


def operations_without_success(document: dict[str, Any], log: str) -> tuple[set[str], set[str]]:
    """Return the operations that got 404 only, and all operations that were called."""
    statuses: dict[str, set[int]] = {}
    for line in log.split("\n"):
        entry = json.loads(line) if line.startswith('{"') else {}
        if entry.get("event") == "request":
            name = operation_of(document, entry["method"].lower(), entry["path"])
            statuses.setdefault(name, set()).add(entry["status"])
    statuses.pop("", None)
    return {name for name, of_name in statuses.items() if of_name <= {404}}, set(statuses)


def operation_of(document: dict[str, Any], method: str, path: str) -> str:
    for template, methods in document["paths"].items():
        if method in methods and re.fullmatch(re.sub(r"{\w+}", "[^/]+", template), path):
            return str(methods[method]["operationId"])
    return ""
