"""Covers: benchmarks/vllm_serve_client.py"""

import io
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from benchmarks import vllm_serve_client
from benchmarks.vllm_serve import FIGURES, Load, figures_of, pair_figures, table, write_dataset
from gateway.bench.prompts import read_dataset


def figures(**changes: float) -> dict[str, float]:
    return {figure.name: 10.0 for figure in FIGURES} | changes


def test_both_clients_get_the_same_prompts(tmp_path: Path) -> None:
    path = tmp_path / "p.jsonl"
    write_dataset(path, Load(5, 2, 48))
    requests = read_dataset(path)
    assert [request.max_tokens for request in requests] == [48] * 5
    assert len({request.messages[0]["content"] for request in requests}) == 5


def test_the_gap_between_the_role_and_the_first_token_is_left_out() -> None:
    result = {"itls": [[0.0, 0.01, 0.03], [0.0, 0.02]], "mean_itl_ms": 12.0}
    assert figures_of(result, has_role_gap=True)["mean_itl_ms without the role"] == pytest.approx(20.0)
    assert figures_of(result, has_role_gap=False)["mean_itl_ms without the role"] == pytest.approx(12.0)
    assert figures_of(result, has_role_gap=True)["mean_itl_ms"] == 12.0


def test_pairs_have_the_figures_of_a_run() -> None:
    """Two requests of three tokens; vLLM's gaps have the role's as well."""
    ours = pair_figures([[0.1, 0.3, [0.1, 0.1], 3], [0.3, 0.7, [0.2, 0.2], 3]], has_role_gap=False)
    theirs = pair_figures([[0.1, 0.3, [0.0, 0.1, 0.1], 3], [0.3, 0.7, [0.0, 0.2, 0.2], 3]], has_role_gap=True)
    assert ours["mean_ttft_ms"] == pytest.approx(200.0)
    assert ours["mean_tpot_ms"] == pytest.approx(150.0)
    assert ours["output_throughput"] == pytest.approx(6.0)
    assert theirs["mean_itl_ms"] == pytest.approx(100.0)
    assert {name: value for name, value in theirs.items() if name != "mean_itl_ms"} == pytest.approx(
        {name: value for name, value in ours.items() if name != "mean_itl_ms"}
    )


def test_the_median_of_the_rounds_ratios_decides() -> None:
    steady, slow = figures(), figures(mean_ttft_ms=13.0)
    text, all_within = table([(steady, steady), (slow, steady), (steady, steady)])
    assert all_within
    assert "| mean_ttft_ms (ms) | 10.00 | 10.00 | 1.000 | 1.000 to 1.300 | PASS |" in text
    text, all_within = table([(slow, steady)])
    assert not all_within
    assert "| 1.300 | 1.300 to 1.300 | FAIL |" in text


def test_a_figure_for_comparison_only_is_not_judged() -> None:
    assert table([(figures(mean_itl_ms=11.0), figures())])[1]


def test_the_client_of_vllm_says_how_each_run_ended(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    def main(given: object) -> None:
        print("noise")
        if given.model == "bad":  # type: ignore[attr-defined]
            raise ValueError("no such model")

    dataset = SimpleNamespace(dataset_path=str(tmp_path / "p.jsonl"))
    write_dataset(tmp_path / "p.jsonl", Load(2, 1, 4))
    module = SimpleNamespace(
        add_cli_args=lambda parser: parser.add_argument("--model"), main=main, CustomDataset=SimpleNamespace()
    )
    monkeypatch.setattr(vllm_serve_client.importlib, "import_module", lambda name: module)
    monkeypatch.setattr(
        sys, "stdin", io.StringIO(f"{json.dumps(['--model', 'm'])}\n{json.dumps(['--model', 'bad'])}\n")
    )
    vllm_serve_client.serve()
    shown = capsys.readouterr()
    assert shown.out.split() == ["ready", "done", "failed"]
    assert "no such model" in shown.err
    module.CustomDataset.load_data(dataset)
    assert [row["output_tokens"] for row in dataset.data] == [4, 4]
