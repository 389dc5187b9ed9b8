"""Dashboard and alert rules name only what the server exports."""

import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import get_args

import pytest
import yaml
from prometheus_client.metrics import MetricWrapperBase

from gnuq_serve.service.scorer.messages import ScorerStatus
from gnuq_serve.service.seeing import metrics, reasons
from gnuq_serve.uncertainty import Status

FOLDER = Path(__file__).parents[2] / "integrations" / "grafana"
DASHBOARD = json.loads((FOLDER / "dashboard.json").read_text(encoding="utf-8"))
RULES = [
    rule
    for group in yaml.safe_load((FOLDER / "alerts.yml").read_text(encoding="utf-8"))["groups"]
    for rule in group["rules"]
]
PANELS = [panel for panel in DASHBOARD["panels"] if panel["type"] != "row"]
QUERIES = [target["expr"] for panel in PANELS for target in panel["targets"]] + [rule["expr"] for rule in RULES]
QUERIES += [
    variable["query"]["query"] for variable in DASHBOARD["templating"]["list"] if "definition" in variable
]

SERIES = re.compile(r"\b(gnuq_\w+)(?:\{([^}]*)\})?")
MATCHER = re.compile(r'(\w+)\s*(?:=~|!~|!=|=)\s*"([^"]*)"')
BY_PROMETHEUS = {"job", "instance"}
SUFFIXES = {"counter": ["_total"], "gauge": [""], "histogram": ["_bucket", "_sum", "_count"]}
VALUES = {
    "status": {*get_args(Status), *get_args(ScorerStatus)},
    "reason": {code for code, _ in reasons._REASONS} | {"", reasons.OTHER},
    "warning": {code for code, _ in reasons._WARNINGS} | {reasons.OTHER},
}


def exported():
    """Each series by its name as exported, and its labels."""
    found = {}
    for metric in METRICS:
        for suffix in SUFFIXES[metric._type]:
            # The sum of values that may be negative is no counter, and not exported.
            if suffix == "_sum" and metric._upper_bounds[0] < 0:
                continue
            found[metric._name + suffix] = {*metric._labelnames, *(["le"] if suffix == "_bucket" else [])}
    return found


METRICS = [metric for metric in vars(metrics).values() if isinstance(metric, MetricWrapperBase)]
EXPORTED = exported()


def test_the_series_are_found():
    assert EXPORTED["gnuq_answers_total"] == {"route", "status", "reason"}
    assert EXPORTED["gnuq_score_seconds_bucket"] == {"status", "le"}
    assert len(EXPORTED) > 20
    assert len(QUERIES) > 30


@pytest.mark.parametrize("query", QUERIES)
def test_each_query_names_series_labels_and_values_that_exist(query):
    named = SERIES.findall(query)
    assert named
    labels = set()
    for name, matchers in named:
        assert name in EXPORTED, f"{name} is not exported"
        labels |= EXPORTED[name]
        for label, value in MATCHER.findall(matchers):
            assert label in EXPORTED[name] | BY_PROMETHEUS, f"{name} has no label {label}"
            if value and not value.startswith("$") and label in VALUES:
                patterns = value.split("|")
                unknown = [
                    one for one in patterns if not any(re.fullmatch(one, known) for known in VALUES[label])
                ]
                assert not unknown, f"{label} is never {unknown}"
    for group in re.findall(r"\b(?:by|on) \(([^)]*)\)", query):
        assert set(group.split(", ")) <= labels | BY_PROMETHEUS


def test_each_series_is_shown_or_watched():
    """A series that nobody looks at should not be there."""
    used = {name for query in QUERIES for name, _ in SERIES.findall(query)}
    assert {
        name for name in (metric._name for metric in METRICS) if not any(one.startswith(name) for one in used)
    } == set()


def test_the_dashboard_is_whole():
    ids = [panel["id"] for panel in DASHBOARD["panels"]]
    assert len(ids) == len(set(ids))
    cells = set()
    for panel in DASHBOARD["panels"]:
        at = panel["gridPos"]
        assert at["x"] + at["w"] <= 24
        covered = {(x, y) for x in range(at["x"], at["x"] + at["w"]) for y in range(at["y"], at["y"] + at["h"])}
        assert not covered & cells, f"{panel['title']} lies over another panel"
        cells |= covered
    for panel in PANELS:
        assert {target["datasource"]["uid"] for target in panel["targets"]} == {"${datasource}"}
        assert len({target["refId"] for target in panel["targets"]}) == len(panel["targets"])


def test_the_operators_page_names_every_series_reason_and_warning():
    page = (FOLDER.parents[1] / "docs" / "operating.md").read_text(encoding="utf-8")
    names = {metric._name + ("_total" if metric._type == "counter" else "") for metric in METRICS}
    codes = VALUES["reason"] | VALUES["warning"]
    assert set(re.findall(r"`(gnuq_[a-z_]+)[`{]", page)) - {"gnuq_serve"} == names
    assert [code for code in sorted(codes) if code and f"`{code}`" not in page] == []
    assert set(re.findall(r"\bGnuq\w+", page)) <= {rule["alert"] for rule in RULES}


def test_the_operators_page_gives_each_reason_its_code():
    page = (FOLDER.parents[1] / "docs" / "operating.md").read_text(encoding="utf-8")
    checked = 0
    for row in page.splitlines():
        for reason in re.findall(r"`(?:skipped|failed)`: ([^;|]+)", row if row.startswith("| ") else ""):
            codes = re.findall(r"`(\w+)`", row.split("|")[3])
            assert reasons.reason_code(reason) in codes, reason
            checked += 1
    assert checked > 15


@pytest.mark.skipif(shutil.which("promtool") is None, reason="promtool is not here: apt-get install prometheus")
def test_the_rules_raise_the_alarms_that_they_should():
    run = subprocess.run(
        ["promtool", "test", "rules", "alerts_test.yml"], cwd=FOLDER, capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stdout + run.stderr
    tested = {
        case["alertname"]
        for test in yaml.safe_load((FOLDER / "alerts_test.yml").read_text(encoding="utf-8"))["tests"]
        for case in test["alert_rule_test"]
    }
    assert tested == {rule["alert"] for rule in RULES}
