"""scripts/mutate.toml names what is there, and gives a reason for each survivor."""

import tomllib
from typing import Any

import pytest

from tests.processes import ROOT

PLAN: dict[str, Any] = tomllib.loads((ROOT / "scripts/mutate.toml").read_text())


@pytest.mark.parametrize("target", PLAN["target"], ids=lambda target: target["module"])
def test_a_module_that_is_mutated_and_its_tests_are_there(target: dict[str, Any]) -> None:
    source = (ROOT / target["module"]).read_text()
    for test in target["tests"]:
        assert (ROOT / test.partition("::")[0]).exists()
    for function in target.get("functions", ()):
        assert f"def {function}(" in source


def test_a_survivor_is_a_line_that_is_there_and_has_a_reason() -> None:
    for survivor in PLAN.get("survivor", ()):
        lines = [line.strip() for line in (ROOT / survivor["module"]).read_text().splitlines()]
        for line in survivor["change"].strip().splitlines():
            assert not line.startswith("- ") or line[2:].strip() in lines, survivor["change"]
        assert survivor["reason"].strip(), survivor["change"]
