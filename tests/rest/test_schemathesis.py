"""The generated document against the running server: whatever fits it, or just does not, is answered as it says."""

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
from tests.test_roles import things_of

CHECKS = (
    "not_a_server_error",
    "status_code_conformance",
    "response_schema_conformance",
    "response_headers_conformance",
    "unsupported_method",
)
# They would end the session that the run lives on.
NOT_CALLED = {"logout", "delete_profile", "end_session", "end_other_sessions", "change_password"}
UNKNOWN = {"accept_invitation", "read_artifact"}  # no token can be guessed; there is no such file
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
    nothing, called = found_nothing(document, server.output)
    assert nothing <= UNKNOWN
    every = {it["operationId"] for methods in document["paths"].values() for it in methods.values()} - NOT_CALLED
    assert called >= every if full else called  # how many fit into the short time depends on the machine


async def name_things(document: dict[str, Any], actor: Actor) -> None:
    """Things that exist, in every path; what is deleted is missed by no other operation."""
    kept = await things_of(actor)
    for path, methods in document["paths"].items():
        for method, operation in methods.items():
            ids = await things_of(actor) if method == "delete" and "{" in path else kept
            for each in operation["parameters"]:
                if each["in"] == "path":
                    each["enum"] = [ids[each["name"]]]


def found_nothing(document: dict[str, Any], log: str) -> tuple[set[str], set[str]]:
    """Of the operations that were called, those that were answered with nothing but 404; and all of them."""
    statuses: dict[str, set[int]] = {}
    for line in log.split("\n"):
        told = json.loads(line) if line.startswith('{"') else {}
        if told.get("event") == "request":
            name = operation_of(document, told["method"].lower(), told["path"])
            statuses.setdefault(name, set()).add(told["status"])
    statuses.pop("", None)
    return {name for name, of_name in statuses.items() if of_name <= {404}}, set(statuses)


def operation_of(document: dict[str, Any], method: str, path: str) -> str:
    for template, methods in document["paths"].items():
        if method in methods and re.fullmatch(re.sub(r"{\w+}", "[^/]+", template), path):
            return str(methods[method]["operationId"])
    return ""
