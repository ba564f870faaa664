"""The README equals the code: its tables, its map, its commands."""

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from server import settings
from server.app import API, MESSAGES
from server.errors import CODES
from server.jobs.types import JOB_TYPES
from server.projects.access import Role, requirement_of
from server.realtime.table import merge
from server.rest.marks import is_public

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def table_under(heading: str) -> list[tuple[str, ...]]:
    """Return the rows of the first table below a heading."""
    section = README.split(f"\n## {heading}\n", 1)[1].split("\n## ", 1)[0]
    lines = [line for line in section.splitlines() if line.startswith("|")]
    return [tuple(cell.strip() for cell in line.strip("|").split(" | ")) for line in lines[2:]]


def field_names(schema: object) -> str:
    """Format the fields of a schema as in the tables: ``a, b?``."""
    return ", ".join(
        f"`{field.data_key or name}{'' if field.required else '?'}`"
        for name, field in schema.fields.items()  # type: ignore[attr-defined]
    )


def test_table_of_settings_equals_the_code() -> None:
    assert table_under("Settings") == [(f"`{name}`", default, help) for name, default, help in settings.table()]


def test_table_of_error_codes_equals_the_code() -> None:
    assert table_under("Error codes") == [
        (f"`{code}`", str(status or "socket"), meaning.removeprefix("socket: "))
        for code, (status, meaning) in CODES.items()
    ]


def test_table_of_socket_messages_equals_the_code() -> None:
    def needs(handler: object) -> str:
        requirement = requirement_of(handler)  # type: ignore[arg-type]
        return Role(requirement.role).name.lower() if requirement else "–"

    assert table_under("Messages of a socket") == [
        (f"`{event}`", field_names(message.schema), needs(message.handler), message.summary)
        for event, message in merge(MESSAGES).items()
    ]


def test_table_of_routes_and_roles_equals_the_code() -> None:
    def needs(handler: object) -> str:
        if is_public(handler):  # type: ignore[arg-type]
            return "all"
        requirement = requirement_of(handler)  # type: ignore[arg-type]
        return Role(requirement.role).name.lower() if requirement else "signed in"

    assert table_under("Routes and who may call them") == [
        (f"`{route.method} {route.path}`", needs(route.handler), route.handler.__apispec__["summary"])
        for table in API
        for route in table
        if hasattr(route.handler, "__apispec__")
    ]


def test_table_of_job_types_equals_the_code() -> None:
    assert table_under("Types of jobs") == [
        (f"`{name}`", field_names(type.schema), f"{type.timeout} s", type.summary) for name, type in JOB_TYPES.items()
    ]


def mapped() -> Iterator[str]:
    """Yield every path of the map: the indentation is the depth."""
    block = README.split("\n## The map\n", 1)[1].split("```")[1]
    parents: list[str] = []
    for line in block.strip("\n").splitlines():
        depth, name = (len(line) - len(line.lstrip())) // 2, line.split()[0]
        parents[depth:] = [name]
        yield "".join(parents)


@pytest.mark.parametrize("path", list(mapped()))
def test_every_path_of_the_map_exists(path: str) -> None:
    assert (ROOT / path).exists()
    assert (ROOT / path).is_dir() == path.endswith("/")


def test_map_shows_every_package() -> None:
    packages = {f"server/{path.parent.name}/" for path in (ROOT / "server").glob("*/__init__.py")}
    assert packages <= set(mapped())


def test_every_path_that_is_linked_exists() -> None:
    links = re.findall(r"\]\((?!https?:)([^)#]+)", README)
    assert [link for link in links if not (ROOT / link).exists()] == []


@pytest.mark.parametrize("script", sorted(set(re.findall(r"\bscripts/[a-z]+\b(?![./])", README))))
def test_every_script_that_is_named_can_be_run(script: str) -> None:
    assert (ROOT / script).stat().st_mode & 0o111 or (ROOT / script).is_dir()
