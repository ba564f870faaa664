"""The dashboard and the alert rules ask for nothing that the servers do not tell."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from prometheus_client.metrics import MetricWrapperBase

from server import metrics
from server.ops import exposition
from tests.markdown import anchors

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "scripts" / "observability"
OF_PROMETHEUS = {"up": {"job", "instance"}}
ADDED = {"job", "instance", "le"}  # by the scrape, and by histograms
SUFFIXES = {"counter": ("_total",), "gauge": ("",), "histogram": ("_bucket", "_count", "_sum")}
SELECTOR = re.compile(r"([a-zA-Z_:][a-zA-Z0-9_:]*)\s*\{([^}]*)\}")
GROUPING = re.compile(r"\bby \(([^)]*)\)")


def told() -> dict[str, set[str]]:
    """The series that the servers tell, with their labels."""
    series = OF_PROMETHEUS | {name: {*exposition.JOB_LABELS, *ADDED} for name in exposition.OF_JOBS}
    for metric in vars(metrics).values():
        if isinstance(metric, MetricWrapperBase):
            for suffix in SUFFIXES[metric._type]:
                series[metric._name + suffix] = {*metric._labelnames, *ADDED}
    return series


def dashboard() -> dict[str, Any]:
    return json.loads((FOLDER / "dashboard.json").read_text())


def rules(kind: str = "alert") -> list[dict[str, Any]]:
    """The rules that alert, or those that ``record``."""
    groups = yaml.safe_load((FOLDER / "alerts.yaml").read_text())["groups"]
    return [rule for group in groups for rule in group["rules"] if kind in rule]


def questions() -> list[Any]:
    shown = [
        pytest.param(target["expr"], id=f"{panel['title']} {target['refId']}")
        for panel in dashboard()["panels"]
        for target in panel.get("targets", [])
    ]
    ruled = [pytest.param(rule["expr"], id=rule[kind]) for kind in ("alert", "record") for rule in rules(kind)]
    return shown + ruled


@pytest.mark.parametrize("expression", questions())
def test_what_is_asked_for_is_told(expression: str) -> None:
    series, asked = told(), SELECTOR.findall(expression)
    assert asked
    having: set[str] = set()
    for name, matchers in asked:
        assert name in series, f"no metric {name}"
        assert set(re.findall(r"(\w+)\s*(?:=~|!~|!=|=)", matchers)) <= series[name], name
        having |= series[name]
    for labels in GROUPING.findall(expression):
        assert {label.strip() for label in labels.split(",")} <= having


@pytest.mark.parametrize("expression", questions())
def test_brackets_close(expression: str) -> None:
    open_ones: list[str] = []
    for character in re.sub(r'"[^"]*"', "", expression):
        if character in "([{":
            open_ones.append({"(": ")", "[": "]", "{": "}"}[character])
        elif character in ")]}":
            assert open_ones.pop() == character
    assert not open_ones


@pytest.mark.parametrize("expression", questions())
def test_what_every_process_tells_of_the_installation_is_never_added_up(expression: str) -> None:
    for name in exposition.OF_JOBS:
        asked = re.findall(rf"\b{name}\b", expression)
        assert len(re.findall(rf"\bmax(?: by \([^)]*\))?\s*\({name}\b", expression)) == len(asked)


def test_a_metric_that_does_not_exist_would_be_noticed() -> None:
    assert "http_requests_total" not in told()
    assert "http_request_duration_seconds_bucket" in told()
    assert "websocket_closed_total" in told()


def test_counters_are_never_shown_without_a_rate() -> None:
    for parameter in questions():
        for name in re.findall(r"(\w+(?:_total|_bucket|_count))\{", parameter.values[0]):
            assert re.search(rf"rate\(\s*{name}", parameter.values[0]), name


def test_panels_have_a_place_and_an_id_of_their_own() -> None:
    panels = dashboard()["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    cells = [
        (x, y)
        for place in (panel["gridPos"] for panel in panels)
        for x in range(place["x"], place["x"] + place["w"])
        for y in range(place["y"], place["y"] + place["h"])
    ]
    assert len(set(cells)) == len(cells)
    described = [panel["description"] for panel in panels if panel["type"] != "row"]
    assert all(described)
    assert len(set(described)) == len(described), "of its own, not another's"


@pytest.mark.parametrize("rule", rules(), ids=lambda rule: rule["alert"])
def test_each_alert_says_how_urgent_it_is_and_where_it_is_explained(rule: dict[str, Any]) -> None:
    assert rule["labels"]["severity"] in ("page", "ticket")
    path, _, heading = rule["annotations"]["runbook"].partition("#")
    assert not heading or heading in anchors((ROOT / path).read_text())
