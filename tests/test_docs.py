"""The documentation says what the code does: its tables, its examples, its map, its commands, its links.

``.venv/bin/python -m tests.test_docs`` generates the tables of docs/reference.md from the code.
"""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from server import settings
from server.app import API, MESSAGES
from server.auth import schemas as auth
from server.documents import schemas as documents
from server.errors import ERROR_CODES
from server.jobs import schemas as jobs
from server.jobs.types import JOB_TYPES
from server.projects import schemas as projects
from server.projects.access import Role, requirement_of
from server.realtime.asyncapi import CLOSE_CODES, push_name
from server.realtime.events import PUSHES
from server.realtime.table import merge
from server.rest.marks import is_public
from tests.markdown import anchors, blocks, links, section, table
from tests.sockets import schema_name_of, validate_frame

ROOT = Path(__file__).parent.parent
REFERENCE = ROOT / "docs/reference.md"
PAGES = sorted(str(path.relative_to(ROOT)) for path in (*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")))
MAX_README_LINES = 130
ENTITIES = {
    "User": auth.UserSchema,
    "Person": auth.Person,
    "Session": auth.Session,
    "Project": projects.Project,
    "Collaborator": projects.Collaborator,
    "Invitation": projects.Invitation,
    "Workspace": projects.Workspace,
    "Document": documents.Document,
    "Version": documents.Version,
    "Activity": projects.Activity,
    "Job": jobs.Job,
}
Row = tuple[str, ...]


def read(page: str) -> str:
    return (ROOT / page).read_text()


def field_names(schema: Any) -> str:
    """Return ``a, b?`` as the tables write them."""
    return ", ".join(
        f"`{field.data_key or name}{'' if field.required else '?'}`" for name, field in schema.fields.items()
    )


def needs(handler: Any, *, otherwise: str) -> str:
    """Return the minimum role of a handler."""
    requirement = requirement_of(handler)
    return Role(requirement.role).name.lower() if requirement else otherwise


def takes(handler: Any) -> str:
    """Return the fields of a route's body and query."""
    parts = ["text"] if "text/plain" in handler.__apispec__.get("consumes", ()) else []
    for declared in getattr(handler, "__schemas__", ()):
        if declared["location"] == "json":
            parts.append(field_names(declared["schema"]))
        else:
            parts += [f"`?{field.data_key}`" for field in declared["schema"].fields.values()]
    return ", ".join(parts)


def reference() -> dict[str, tuple[Row, list[Row]]]:
    """Return the tables of docs/reference.md by the headings above them: head and rows."""
    described = [route for routes in API for route in routes if hasattr(route.handler, "__apispec__")]
    return {
        "## Routes": (
            ("route", "role", "body and query", "summary"),
            [
                (
                    f"`{route.method} {route.path}`",
                    "all" if is_public(route.handler) else needs(route.handler, otherwise="signed in"),
                    takes(route.handler),
                    route.handler.__apispec__["summary"],
                )
                for route in described
            ],
        ),
        "## Settings": (
            ("name", "default", "meaning"),
            [(f"`{name}`", default, help) for name, default, help in settings.documented_settings()],
        ),
        "## Error codes": (
            ("code", "status", "meaning"),
            [
                (f"`{code}`", str(status or "socket"), meaning.removeprefix("socket: "))
                for code, (status, meaning) in ERROR_CODES.items()
            ],
        ),
        "## Socket messages": (
            ("event", "data", "role", "summary"),
            [
                (f"`{event}`", field_names(message.schema), needs(message.handler, otherwise="–"), message.summary)
                for event, message in merge(MESSAGES).items()
            ],
        ),
        "## Job types": (
            ("type", "payload", "time limit of an attempt", "summary"),
            [
                (f"`{name}`", field_names(type.schema), f"{type.timeout} s", type.summary)
                for name, type in JOB_TYPES.items()
            ],
        ),
    }


@pytest.mark.parametrize("heading", list(reference()))
def test_tables_of_the_reference_are_those_of_the_code(heading: str) -> None:
    _, rows = reference()[heading]
    assert table(section(REFERENCE.read_text(), heading)) == rows


@pytest.mark.parametrize("name", list(ENTITIES))
def test_entities_have_the_fields_that_answers_have(name: str) -> None:
    described = dict(row[:2] for row in table(section(read("docs/api.md"), "## Entities")))
    fields = ENTITIES[name]().fields.items()
    assert described[name] == ", ".join(f"`{field.data_key or name}`" for name, field in fields)


def frames(heading: str) -> Iterator[dict[str, Any]]:
    for block in blocks(section(read("docs/realtime.md"), heading), "json"):
        yield json.loads(block)


@pytest.mark.parametrize("message", merge(MESSAGES))
def test_each_message_of_a_client_has_an_example_with_its_ack(message: str) -> None:
    name = message.replace(":", ".")
    sent, ack = frames(f"### `{message}`")
    validate_frame(sent, name)
    validate_frame(ack, f"{name}.ack")


@pytest.mark.parametrize("push", PUSHES, ids=lambda push: push.name)
def test_each_message_of_the_server_has_an_example(push: Any) -> None:
    (frame,) = frames(f"### `{push.name}` from the server" if push.name in merge(MESSAGES) else f"### `{push.name}`")
    validate_frame(frame, schema_name_of(frame))
    assert schema_name_of(frame) == push_name(push)


def test_close_codes_of_the_socket() -> None:
    assert {row[0] for row in table(section(read("docs/realtime.md"), "## Close codes"))} == {
        str(code) for code in CLOSE_CODES
    }


def mapped() -> Iterator[str]:
    """Every path that the map shows: indentation is depth."""
    block = next(block for block in blocks(read("docs/architecture.md"), "") if block.startswith("run.py"))
    above: list[str] = []
    for line in block.splitlines():
        depth, name = (len(line) - len(line.lstrip())) // 2, line.split()[0]
        above[depth:] = [name]
        yield "".join(above)


@pytest.mark.parametrize("path", list(mapped()))
def test_what_the_map_shows_exists(path: str) -> None:
    assert (ROOT / path).exists()
    assert (ROOT / path).is_dir() == path.endswith("/")


def test_the_map_shows_every_package() -> None:
    packages = {f"server/{path.parent.name}/" for path in (ROOT / "server").glob("*/__init__.py")}
    assert packages <= set(mapped())


@pytest.mark.parametrize("page", PAGES)
def test_every_relative_link_leads_somewhere(page: str) -> None:
    broken = []
    for link in links(read(page)):
        path, _, anchor = link.partition("#")
        if re.match(r"[a-z]+:", link):
            continue
        target = (ROOT / page).parent / path if path else ROOT / page
        if not target.exists() or (anchor and anchor not in anchors(target.read_text())):
            broken.append(link)
    assert broken == []


@pytest.mark.parametrize("page", PAGES)
def test_every_json_example_is_json(page: str) -> None:
    for block in blocks(read(page), "json"):
        json.loads(block)


def test_the_readme_is_short() -> None:
    assert len(read("README.md").splitlines()) <= MAX_README_LINES


@pytest.mark.parametrize(
    "script", sorted({script for page in PAGES for script in re.findall(r"\bscripts/[a-z]+\b(?![./-])", read(page))})
)
def test_every_script_that_is_named_can_be_run(script: str) -> None:
    assert (ROOT / script).stat().st_mode & 0o111 or (ROOT / script).is_dir()


def write_reference() -> None:
    text = REFERENCE.read_text()
    for heading, (head, rows) in reference().items():
        lines = ["| " + " | ".join(cells) + " |" for cells in (head, *rows)]
        written = "\n".join([lines[0], "|---" * len(head) + "|", *lines[1:]])
        start = text.index("\n|", text.index(f"\n{heading}\n")) + 1
        end = re.compile(r"^(?!\|)", re.MULTILINE).search(text, start)
        assert end is not None
        text = f"{text[:start]}{written}\n{text[end.start() :]}"
    REFERENCE.write_text(text)


if __name__ == "__main__":
    write_reference()
