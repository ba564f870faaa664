"""scripts/language.py reports each kind of sentence and name that scripts/language.toml refuses."""

import importlib.util
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from tests.processes import ROOT


@pytest.fixture(scope="module")
def language() -> ModuleType:
    spec = importlib.util.spec_from_file_location("language", ROOT / "scripts/language.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def check(language: ModuleType, path: Path, source: str) -> list[Any]:
    path.write_text(source)
    return language.check_file(str(path), language.Rules.read(RULES))


RULES = """
clauses = ["What", "Whoever"]
phrases = ["nobody"]
names = ["Bench"]
exempt = ["elsewhere/"]
"""


@pytest.mark.parametrize(
    "source",
    [
        '"""What a job prints."""\n',
        '"""Store the output.\n\nWhat a job prints is cut."""\n',
        '"""Store the output. Whoever asks later gets it."""\n',
        '"""Store the output:\n\n- What it prints.\n"""\n',
        "x = 1  # what a job prints\n",
        "# The output.\n# What a job prints is cut.\n",
        "def f():\n    # Nobody reads it.\n    return 1\n",
        'class A:\n    x: int\n    """Nobody reads it."""\n',
    ],
)
def test_sentence_that_breaks_a_rule_is_reported(language: ModuleType, tmp_path: Path, source: str) -> None:
    assert len(check(language, tmp_path / "module.py", source)) == 1


@pytest.mark.parametrize(
    "source",
    [
        '"""Store what a job prints."""\n',
        '"""Whatsoever."""\n',
        'x = "What a job prints. Nobody reads it."\n',
        "x = 1  # the output, and\ny = 2  # its length\n",
        "# The output is cut;\n# what is left is stored.\n",
    ],
)
def test_plain_sentence_is_not_reported(language: ModuleType, tmp_path: Path, source: str) -> None:
    assert check(language, tmp_path / "module.py", source) == []


def test_retired_name_is_reported_where_it_is_a_name(language: ModuleType, tmp_path: Path) -> None:
    [finding] = check(language, tmp_path / "module.py", 'x = "Bench"\nclass Bench: ...\n')
    assert finding.line == 2
