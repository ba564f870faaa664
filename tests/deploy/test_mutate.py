"""scripts/mutate.toml names existing code, and gives a reason for each survivor."""

import tomllib
from typing import Any

import pytest

from tests.processes import ROOT

PLAN: dict[str, Any] = tomllib.loads((ROOT / "scripts/mutate.toml").read_text())


@pytest.mark.parametrize("target", PLAN["target"], ids=lambda target: target["module"])
def test_a_mutated_module_and_its_tests_exist(target: dict[str, Any]) -> None:
    source = (ROOT / target["module"]).read_text()
    for test in target["tests"]:
        assert (ROOT / test.partition("::")[0]).exists()
    for function in target.get("functions", ()):
        assert f"def {function}(" in source


def test_a_survivor_is_an_existing_line_and_has_a_reason() -> None:
    for survivor in PLAN.get("survivor", ()):
        lines = [line.strip() for line in (ROOT / survivor["module"]).read_text().splitlines()]
        for line in survivor["change"].strip().splitlines():
            assert not line.startswith("- ") or line[2:].strip() in lines, survivor["change"]
        assert survivor["reason"].strip(), survivor["change"]
