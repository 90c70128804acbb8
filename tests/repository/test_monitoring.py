"""The rules of Prometheus are valid and tested, use metrics that exist, and each alert has its runbook."""

import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml
from prometheus_client import CollectorRegistry

from gateway.telemetry.metrics import Metrics
from tests.fakes.prometheus import DEPLOY, GPU_METRICS, RULES, metrics_of
from tests.programs import program

ROOT = Path(__file__).parents[2]
TESTS = DEPLOY / "alerts.test.yml"
OTHER_METRICS = {
    *("gateway_rate_limited_total", "up", "ALERTS"),
    *("nvidia_smi_utilization_gpu_ratio", "nvidia_smi_memory_used_bytes", "nvidia_smi_memory_total_bytes"),
    *re.findall(r"^# TYPE (\w+)", GPU_METRICS.decode(), re.MULTILINE),
}
"""Metrics of other programs, and those that the gateway has only with keys in a file."""


def rules(*names: str) -> list[dict[str, Any]]:
    """Return the rules of these files, or of all."""
    files = [path for path in RULES if not names or path.stem in names]
    return [rule for path in files for group in yaml.safe_load(path.read_text())["groups"] for rule in group["rules"]]


ALERTS = {rule["alert"]: rule for rule in rules("alerts")}


def promtool(*arguments: str) -> str:
    """Run promtool and return what it printed; fails if it finds a fault."""
    command = [program("promtool"), *arguments]
    outcome = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=150)
    text = outcome.stdout + outcome.stderr
    assert outcome.returncode == 0, text
    return text


def exposed() -> set[str]:
    """Return the names of the series that the gateway exposes."""
    registry = CollectorRegistry()
    Metrics(registry, "0")
    suffixes = {"counter": ["_total"], "info": ["_info"], "histogram": ["_bucket", "_count", "_sum"]}
    return {family.name + suffix for family in registry.collect() for suffix in suffixes.get(family.type, [""])}


def test_configuration_and_rules_are_valid() -> None:
    assert "SUCCESS" in promtool("check", "config", "deploy/prometheus/prometheus.yml")
    text = promtool("check", "rules", *(str(path) for path in RULES))
    assert text.count("SUCCESS") == len(RULES) == 3


@pytest.mark.timeout(180)  # 4 s of processor time
def test_every_alert_fires_and_does_not_fire_as_its_unit_tests_say() -> None:
    assert "SUCCESS" in promtool("test", "rules", str(TESTS))


def test_every_alert_has_a_unit_test_in_which_it_fires_and_one_in_which_it_does_not() -> None:
    checks = [check for test in yaml.safe_load(TESTS.read_text())["tests"] for check in test["alert_rule_test"]]
    fires = {check["alertname"] for check in checks if check["exp_alerts"]}
    rests = {check["alertname"] for check in checks if not check["exp_alerts"]}
    assert fires == set(ALERTS) == rests


def test_rules_use_only_series_that_exist() -> None:
    recorded = {rule["record"] for rule in rules() if "record" in rule}
    used = {name for rule in rules() for name in metrics_of(rule["expr"])}
    assert used - recorded - exposed() == (OTHER_METRICS & used) - exposed()
    assert {rule["record"] for rule in rules("targets")} <= used, "a target that no rule compares with"


@pytest.mark.parametrize("alert", ALERTS)
def test_alert_has_a_runbook(alert: str) -> None:
    rule = ALERTS[alert]
    assert rule["labels"]["severity"] in ("critical", "warning", "info")
    assert set(rule["annotations"]) == {"summary", "description", "runbook_url"}
    page = ROOT / rule["annotations"]["runbook_url"]
    assert page.parent == ROOT / "docs" / "runbooks"
    text = page.read_text()
    assert text.startswith(f"# {alert}\n\nSeverity: {rule['labels']['severity']}.\n")
    assert re.findall(r"^## (.*)$", text, re.MULTILINE) == ["What it means", "What to look at", "What to do"]
    named = set(re.findall(r"`(gateway:target_\w+)`", text))
    assert named <= {target["record"] for target in rules("targets")}
    index = (ROOT / "docs" / "runbooks" / "README.md").read_text()
    assert f"| [{alert}]({page.name}) | {rule['labels']['severity']} |" in index


def test_every_runbook_belongs_to_an_alert() -> None:
    pages = {f"docs/runbooks/{path.name}" for path in (ROOT / "docs" / "runbooks").glob("*.md")}
    assert pages - {"docs/runbooks/README.md"} == {rule["annotations"]["runbook_url"] for rule in ALERTS.values()}


def test_metrics_of_an_expression_are_found() -> None:
    text = """
        histogram_quantile(0.9, sum by (tier, le) (rate(a_bucket{tier=~"$tier|x"}[$__rate_interval]))) > on (tier)
        group_left () tier:b:p99 and on (backend) (c == 1) or vector(0) * 60 unless label_replace(d, "x", "y", "", "")
        """
    assert metrics_of(text) == {"a_bucket", "tier:b:p99", "c", "d"}
