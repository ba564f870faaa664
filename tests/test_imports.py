"""Each library is imported in one place only (import-linter checks the layers, see setup.cfg)."""

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
def test_library_is_imported_in_its_own_packages_only(library: str) -> None:
    users = {home_of(path) for path in SERVER.rglob("*.py") if library in imports(path)}
    assert users <= HOMES[library]
    assert users, f"no module imports {library}: the table is out of date"


def test_the_environment_is_read_in_settings_only() -> None:
    # sandbox_child.py (``sandbox/child.py``) runs in the sandbox: it passes on the empty environment of the sandbox.
    readers = {path.name for path in SERVER.rglob("*.py") if reads_environment(path)} - {"sandbox_child.py"}
    assert readers == {"settings.py"}


def reads_environment(path: Path) -> bool:
    names = {"environ", "getenv"}
    return any(
        (isinstance(node, ast.Attribute) and node.attr in names)
        or (isinstance(node, ast.ImportFrom) and names & {alias.name for alias in node.names})
        for node in ast.walk(ast.parse(path.read_text()))
    )


def test_every_package_has_a_docstring() -> None:
    docstrings = {
        path.parent.name: ast.get_docstring(ast.parse(path.read_text())) for path in SERVER.rglob("__init__.py")
    }
    assert [package for package, docstring in docstrings.items() if not docstring] == []
