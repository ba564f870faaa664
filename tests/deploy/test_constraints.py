"""constraints.txt pins every requirement of setup.cfg, and all installations use it."""

import configparser
import re

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests.processes import ROOT

PINS = [Requirement(line) for line in (ROOT / "constraints.txt").read_text().splitlines() if re.match(r"\w", line)]


def requirements() -> list[Requirement]:
    """Return the requirements of setup.cfg, including its extras."""
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    texts = [setup["options"]["install_requires"], *setup["options.extras_require"].values()]
    lines = {line.strip() for text in texts for line in text.splitlines()}
    return [Requirement(line) for line in sorted(lines) if line and not line.startswith("#")]


@pytest.mark.parametrize("requirement", requirements(), ids=str)
def test_a_requirement_is_pinned_to_a_version_that_it_allows(requirement: Requirement) -> None:
    pins = [pin for pin in PINS if canonicalize_name(pin.name) == canonicalize_name(requirement.name)]
    assert pins
    for pin in pins:
        [version] = pin.specifier
        assert version.operator == "=="
        assert requirement.specifier.contains(version.version, prereleases=True)


def test_the_image_installs_with_the_constraints() -> None:
    text = (ROOT / "Dockerfile").read_text()
    assert "install --constraint constraints.txt" in text
