""".env.example documents the settings of the code."""

import os
import re
from pathlib import Path
from unittest import mock

import pytest

from server import settings
from tests.processes import ROOT

FILE = ROOT / ".env.example"
ENTRY = re.compile(r"# (?P<help>.+) \((?P<note>[^()]*)\)\n#(?P<name>[A-Z_]+)=(?P<value>.*)$", re.MULTILINE)
ENTRIES = {entry["name"]: entry for entry in ENTRY.finditer(FILE.read_text())}
SETTINGS = {name: (default, help) for name, default, help in settings.documented_settings()}


def test_the_file_lists_every_setting_in_the_order_of_the_code() -> None:
    assert [name for name in ENTRIES if name in SETTINGS] == list(SETTINGS)


def test_docker_compose_reads_all_other_variables_of_the_file() -> None:
    compose = (ROOT / "docker-compose.yml").read_text()
    others = {name for name in re.findall(r"^#?([A-Z_]+)=", FILE.read_text(), re.MULTILINE) if name not in SETTINGS}
    assert others == {name for name in re.findall(r"\$\{([A-Z_]+)", compose) if name not in SETTINGS}


@pytest.mark.parametrize("name", SETTINGS)
def test_each_setting_is_listed_with_its_help_and_default(name: str) -> None:
    default, help = SETTINGS[name]
    expected = default if default.startswith("required") else f"default: {default}"
    assert (ENTRIES[name]["help"], ENTRIES[name]["note"]) == (help, expected)
    if literal := re.fullmatch(r"`([^`]*)`", default):
        assert ENTRIES[name]["value"] == literal[1]


def test_an_unchanged_copy_sets_no_variable() -> None:
    assert [line for line in FILE.read_text().splitlines() if line and not line.startswith("#")] == []


def test_the_suggested_values_are_accepted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # away from any .env
    suggested = {name: entry["value"] for name, entry in ENTRIES.items() if entry["value"]}
    with mock.patch.dict(os.environ, suggested, clear=True):
        loaded = settings.load()
    assert loaded.database_url.startswith("postgresql://")
    assert loaded.port == 3000
