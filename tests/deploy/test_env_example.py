"""What an operator finds in .env.example is what the settings are."""

import os
import re
from pathlib import Path
from unittest import mock

import pytest

from server import settings
from tests.processes import ROOT

FILE = ROOT / ".env.example"
ENTRY = re.compile(r"# (?P<help>.+) \((?P<told>[^()]*)\)\n#(?P<name>[A-Z_]+)=(?P<value>.*)$", re.MULTILINE)
ENTRIES = {entry["name"]: entry for entry in ENTRY.finditer(FILE.read_text())}
SETTINGS = {name: (default, help) for name, default, help in settings.table()}


def test_it_lists_every_setting_in_the_order_of_the_code() -> None:
    assert [name for name in ENTRIES if name in SETTINGS] == list(SETTINGS)


def test_what_it_lists_besides_is_read_by_docker_compose() -> None:
    compose = (ROOT / "docker-compose.yml").read_text()
    more = {name for name in re.findall(r"^#?([A-Z_]+)=", FILE.read_text(), re.MULTILINE) if name not in SETTINGS}
    assert more == {name for name in re.findall(r"\$\{([A-Z_]+)", compose) if name not in SETTINGS}


@pytest.mark.parametrize("name", SETTINGS)
def test_each_setting_stands_with_its_help_and_default(name: str) -> None:
    default, help = SETTINGS[name]
    told = default if default.startswith("required") else f"default: {default}"
    assert (ENTRIES[name]["help"], ENTRIES[name]["told"]) == (help, told)
    if literal := re.fullmatch(r"`([^`]*)`", default):
        assert ENTRIES[name]["value"] == literal[1]


def test_a_copy_of_it_changes_nothing() -> None:
    assert [line for line in FILE.read_text().splitlines() if line and not line.startswith("#")] == []


def test_what_it_suggests_is_accepted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # away from any .env
    suggested = {name: entry["value"] for name, entry in ENTRIES.items() if entry["value"]}
    with mock.patch.dict(os.environ, suggested, clear=True):
        loaded = settings.load()
    assert loaded.database_url.startswith("postgresql://")
    assert loaded.port == 3000
