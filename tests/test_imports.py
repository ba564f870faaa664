"""Each decision has one home: what may be imported where (layers are import-linter's, in setup.cfg)."""

import ast
from pathlib import Path

import pytest

SERVER = Path(__file__).parent.parent / "server"
HOMES: dict[str, set[str]] = {
    "saq": {"jobs", "worker.py"},
    "pycrdt": {"documents"},
    "motor": {"resources.py", "jobs"},
    "bcrypt": {"auth"},
    "email_validator": {"auth"},
    "jwt": {"auth"},
    "yoyo": {"migrations.py"},
}


def imports(path: Path) -> set[str]:
    tree = ast.parse(path.read_text())
    names = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    names |= {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.module}
    return {name.partition(".")[0] for name in names}


def home_of(path: Path) -> str:
    return path.relative_to(SERVER).parts[0]


@pytest.mark.parametrize("library", HOMES)
def test_a_library_is_known_in_its_own_rooms_only(library: str) -> None:
    users = {home_of(path) for path in SERVER.rglob("*.py") if library in imports(path)}
    assert users <= HOMES[library]
    assert users, f"nobody imports {library}: the table is out of date"


def test_the_environment_is_read_in_settings_only() -> None:
    # inside.py is a program that runs in the sandbox: what it passes on is the empty environment of there.
    readers = {path.name for path in SERVER.rglob("*.py") if reads_environment(path)} - {"inside.py"}
    assert readers == {"settings.py"}


def reads_environment(path: Path) -> bool:
    names = {"environ", "getenv"}
    return any(
        (isinstance(node, ast.Attribute) and node.attr in names)
        or (isinstance(node, ast.ImportFrom) and names & {alias.name for alias in node.names})
        for node in ast.walk(ast.parse(path.read_text()))
    )


def test_every_room_has_a_door_plate() -> None:
    plates = {path.parent.name: ast.get_docstring(ast.parse(path.read_text())) for path in SERVER.rglob("__init__.py")}
    assert [room for room, plate in plates.items() if not plate] == []
