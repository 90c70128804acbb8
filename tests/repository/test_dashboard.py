"""Grafana's dashboard is well-formed, and its queries name metrics that exist."""

import json
import re
from collections import Counter
from itertools import combinations

from tests.fakes.dashboard import DOCUMENT, FILE, PANELS, QUERIES, VALUES
from tests.fakes.prometheus import GPU_METRICS, metrics_of
from tests.repository.test_monitoring import ROOT, exposed, rules

LATER_METRICS = {
    *("gateway_key_requests_total", "gateway_key_tokens_total", "gateway_rate_limited_total"),
    *("gateway_affinity_total", "gateway_replicas"),
}
"""Metrics of the contract that the gateway has once it has keys in a file, affinity and replicas."""
PROCESS_METRICS = {
    *("process_cpu_seconds_total", "process_resident_memory_bytes", "process_open_fds", "process_max_fds"),
    *("up", "ALERTS"),
}
GPU_EXPORTERS = {
    *re.findall(r"^# TYPE (\w+)", GPU_METRICS.decode(), re.MULTILINE),
    *("nvidia_smi_temperature_gpu", "nvidia_smi_power_draw_watts"),
}
DATA_PANELS = [panel for panel in PANELS if panel["type"] != "row"]


def test_file_is_written_as_grafana_exports_it() -> None:
    assert FILE.read_text() == json.dumps(DOCUMENT, indent=2, ensure_ascii=False) + "\n"


def test_each_question_has_a_row() -> None:
    titles = [panel["title"] for panel in PANELS if panel["type"] == "row"]
    assert titles == [
        "Is it up?",
        "How fast?",
        "How much?",
        "Who waits?",
        "The roll-out: where does the traffic go?",
        "Servers and affinity",
        "Keys",
        "GPU and vLLM",
        "The gateway process",
    ]


def test_panels_have_ids_of_their_own_and_do_not_overlap() -> None:
    assert [number for number, count in Counter(panel["id"] for panel in PANELS).items() if count > 1] == []
    places = [(panel["title"], panel["gridPos"]) for panel in PANELS]
    assert [name for name, place in places if place["x"] + place["w"] > 24] == []
    overlaps = [
        (one, other)
        for (one, a), (other, b) in combinations(places, 2)
        if a["x"] < b["x"] + b["w"]
        and b["x"] < a["x"] + a["w"]
        and a["y"] < b["y"] + b["h"]
        and b["y"] < a["y"] + a["h"]
    ]
    assert overlaps == []


def test_every_panel_has_a_title_a_unit_and_named_queries() -> None:
    for panel in DATA_PANELS:
        assert panel["title"]
        assert panel["fieldConfig"]["defaults"]["unit"]
        assert [target["refId"] for target in panel["targets"]] == list("ABCDEF"[: len(panel["targets"])])
        for target in panel["targets"]:
            assert target["datasource"] == {"type": "prometheus", "uid": "${datasource}"}
            assert target["legendFormat"] or target.get("format") == "table"


def test_latencies_show_three_quantiles_of_both_sides() -> None:
    for metric in ("time_to_first_token_seconds", "inter_token_latency_seconds", "request_duration_seconds"):
        for quantile in ("0.5", "0.95", "0.99"):
            begin = f"histogram_quantile({quantile}, sum by (backend, le) (rate(gateway_{metric}_bucket{{"
            assert [query for query in QUERIES if query.startswith(begin)], begin


def test_queries_use_only_metrics_that_exist() -> None:
    used = {name for query in QUERIES for name in metrics_of(query)}
    of_vllm = {name for name in used if name.startswith("vllm:")}
    recorded = {rule["record"] for rule in rules() if "record" in rule}
    assert used - of_vllm - recorded - exposed() - PROCESS_METRICS - GPU_EXPORTERS == LATER_METRICS - exposed()
    recording = (ROOT / "tests" / "golden" / "vllm-0.32.0" / "recordings.json").read_text()
    assert {name for name in of_vllm if f"{name.removesuffix('_bucket')} " not in recording} == set()


def test_every_metric_of_the_gateway_is_on_the_dashboard() -> None:
    used = " ".join(QUERIES)
    missing = {name for name in exposed() if not re.search(rf"\b{re.sub('_(bucket|count|sum)$', '_', name)}", used)}
    assert missing == {"gateway_build_info"}


def test_queries_use_only_variables_that_the_dashboard_has() -> None:
    variables = {variable["name"] for variable in DOCUMENT["templating"]["list"]}
    used = {name for query in QUERIES for name in re.findall(r"\$(\w+)", query)}
    assert used == set(VALUES)
    assert used - {"__rate_interval"} | {"datasource"} == variables
