"""The dashboard and the alert rules query only metrics that the servers export."""

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
PROMETHEUS_SERIES = {"up": {"job", "instance"}}
ADDED = {"job", "instance", "le"}  # labels that the scrape and histograms add
SUFFIXES = {"counter": ("_total",), "gauge": ("",), "histogram": ("_bucket", "_count", "_sum")}
SELECTOR = re.compile(r"([a-zA-Z_:][a-zA-Z0-9_:]*)\s*\{([^}]*)\}")
GROUPING = re.compile(r"\bby \(([^)]*)\)")


def exported_series() -> dict[str, set[str]]:
    """Return the series that the servers export, with their labels."""
    series = PROMETHEUS_SERIES | {name: {*exposition.JOB_LABELS, *ADDED} for name in exposition.JOB_METRICS}
    for metric in vars(metrics).values():
        if isinstance(metric, MetricWrapperBase):
            for suffix in SUFFIXES[metric._type]:
                series[metric._name + suffix] = {*metric._labelnames, *ADDED}
    return series


def dashboard() -> dict[str, Any]:
    return json.loads((FOLDER / "dashboard.json").read_text())


def rules(kind: str = "alert") -> list[dict[str, Any]]:
    """Return the alerting rules, or with ``record`` the recording rules."""
    groups = yaml.safe_load((FOLDER / "alerts.yaml").read_text())["groups"]
    return [rule for group in groups for rule in group["rules"] if kind in rule]


def expressions() -> list[Any]:
    panel_expressions = [
        pytest.param(target["expr"], id=f"{panel['title']} {target['refId']}")
        for panel in dashboard()["panels"]
        for target in panel.get("targets", [])
    ]
    rule_expressions = [
        pytest.param(rule["expr"], id=rule[kind]) for kind in ("alert", "record") for rule in rules(kind)
    ]
    return panel_expressions + rule_expressions


@pytest.mark.parametrize("expression", expressions())
def test_every_queried_series_and_label_is_exported(expression: str) -> None:
    series, selectors = exported_series(), SELECTOR.findall(expression)
    assert selectors
    labels_of_selectors: set[str] = set()
    for name, matchers in selectors:
        assert name in series, f"no metric {name}"
        assert set(re.findall(r"(\w+)\s*(?:=~|!~|!=|=)", matchers)) <= series[name], name
        labels_of_selectors |= series[name]
    for labels in GROUPING.findall(expression):
        assert {label.strip() for label in labels.split(",")} <= labels_of_selectors


@pytest.mark.parametrize("expression", expressions())
def test_brackets_are_balanced(expression: str) -> None:
    expected: list[str] = []
    for character in re.sub(r'"[^"]*"', "", expression):
        if character in "([{":
            expected.append({"(": ")", "[": "]", "{": "}"}[character])
        elif character in ")]}":
            assert expected.pop() == character
    assert not expected


@pytest.mark.parametrize("expression", expressions())
def test_metrics_of_the_whole_installation_are_never_summed_over_processes(expression: str) -> None:
    for name in exposition.JOB_METRICS:
        uses = re.findall(rf"\b{name}\b", expression)
        assert len(re.findall(rf"\bmax(?: by \([^)]*\))?\s*\({name}\b", expression)) == len(uses)


def test_the_check_detects_a_metric_that_does_not_exist() -> None:
    assert "http_requests_total" not in exported_series()
    assert "http_request_duration_seconds_bucket" in exported_series()
    assert "websocket_closed_total" in exported_series()


def test_counters_are_never_queried_without_a_rate() -> None:
    for parameter in expressions():
        for name in re.findall(r"(\w+(?:_total|_bucket|_count))\{", parameter.values[0]):
            assert re.search(rf"rate\(\s*{name}", parameter.values[0]), name


def test_panels_have_unique_positions_ids_and_descriptions() -> None:
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
    assert len(set(described)) == len(described), "two panels have the same description"


@pytest.mark.parametrize("rule", rules(), ids=lambda rule: rule["alert"])
def test_each_alert_has_a_severity_and_a_runbook(rule: dict[str, Any]) -> None:
    assert rule["labels"]["severity"] in ("page", "ticket")
    path, _, heading = rule["annotations"]["runbook"].partition("#")
    assert not heading or heading in anchors((ROOT / path).read_text())
